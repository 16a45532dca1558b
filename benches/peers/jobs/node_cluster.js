// Node's cluster: the primary starts workers anew that end, and replaces them one after
// the other on SIGHUP, each when the next listens.
//
//   node node_cluster.js PORT WORKERS TICKS MILLISECONDS TICK
'use strict';
const cluster = require('cluster');
const http = require('http');
const [port, workers, ticks, every, tick] = process.argv.slice(2);

function serve(request, response) {
  if (request.url !== '/stream') {
    const body = `${process.pid}\n`;
    response.writeHead(200, { 'Content-Type': 'text/plain', 'Content-Length': body.length });
    response.end(body);
    return;
  }
  response.writeHead(200, { 'Content-Type': 'text/plain' });
  let left = Number(ticks);
  const timer = setInterval(() => {
    response.write(tick);
    left -= 1;
    if (left === 0) {
      clearInterval(timer);
      response.end();
    }
  }, Number(every));
  response.on('close', () => clearInterval(timer));
}

if (cluster.isPrimary) {
  const leaving = new Set();
  let restarting = false;
  let again = false;
  for (let count = 0; count < Number(workers); count += 1) cluster.fork();
  cluster.on('exit', (worker) => {
    if (!leaving.delete(worker.id)) cluster.fork();
  });
  const restart = () => {
    again = restarting;
    if (restarting) return;
    restarting = true;
    const old = Object.values(cluster.workers).filter((worker) => !leaving.has(worker.id));
    const next = () => {
      const worker = old.pop();
      if (worker === undefined) {
        restarting = false;
        if (again) restart();
        return;
      }
      cluster.fork().once('listening', () => {
        leaving.add(worker.id);
        worker.disconnect();
        next();
      });
    };
    next();
  };
  process.on('SIGHUP', restart);
} else {
  process.on('SIGHUP', () => {});
  const server = http.createServer({ keepAliveTimeout: 60000 }, serve);
  server.listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 });
}
