"""The application that gunicorn serves: the process, or a stream of ticks."""

import os
import time

TICKS = int(os.environ["JOBS_TICKS"])
EVERY = int(os.environ["JOBS_TICK_MS"]) / 1000
TICK = os.environ["JOBS_TICK"].encode()


def stream():
    for _ in range(TICKS):
        time.sleep(EVERY)
        yield TICK


def application(environ, start_response):
    if environ["PATH_INFO"] == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return stream()
    body = b"%d\n" % os.getpid()
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]
