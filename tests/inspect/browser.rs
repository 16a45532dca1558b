//! The page in a real browser, which is driven through WebDriver.
//!
//! With `BOWLINE_PICTURES=FOLDER` each test leaves pictures of the page there; those of
//! `inspect/pictures` were made so, and so were those of the guide (`src/pictures`).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::{Program, connect, not_run, say};

const PATIENCE: Duration = Duration::from_secs(60);

/// A headless browser with one window.
struct Browser {
    driver: Child,
    port: u16,
    session: String,
}

impl Browser {
    /// `None` where there is no browser, which is said.
    fn start() -> Option<Self> {
        let driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut driver = match driver {
            Ok(driver) => driver,
            Err(error) => {
                not_run(&format!("chromedriver: {error}"));
                return None;
            }
        };
        let output = BufReader::new(driver.stdout.take().unwrap());
        let mut lines = output.lines().map(Result::unwrap);
        let port = lines.find_map(|line| {
            let (_, port) = line.split_once("started successfully on port ")?;
            port.trim_end_matches('.').parse().ok()
        });
        // It goes on to write, and nobody has to read.
        std::thread::spawn(move || lines.for_each(drop));
        let mut browser = Self {
            driver,
            port: port.expect("it tells its port"),
            session: String::new(),
        };
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1200,900",
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments},
        }}});
        let session = browser.call("POST", "/session", &wanted);
        browser.session = session["sessionId"].as_str().unwrap().to_owned();
        Some(browser)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = match method {
            "POST" => body.to_string(),
            _ => String::new(),
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.port,
            body.len(),
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        // It does not close, whatever it is asked.
        let mut reader = BufReader::new(stream);
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            let start = head.len();
            assert!(reader.read_line(&mut head).unwrap() > 0, "{head}");
            let line = head[start..].to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let mut value: Value = serde_json::from_slice(&body).unwrap();
        assert!(
            head.starts_with("HTTP/1.1 200"),
            "{method} {path}: {value:#}"
        );
        value["value"].take()
    }

    fn of_session(&self, method: &str, path: &str, body: &Value) -> Value {
        let path = format!("/session/{}/{path}", self.session);
        self.call(method, &path, body)
    }

    fn open(&self, url: &str) {
        self.of_session("POST", "url", &json!({"url": url}));
    }

    fn run(&self, script: &str) -> Value {
        self.of_session(
            "POST",
            "execute/sync",
            &json!({"script": script, "args": []}),
        )
    }

    /// Waits until a script answers true.
    #[track_caller]
    fn until(&self, script: &str) {
        eventually(PATIENCE, || match self.run(script) {
            Value::Bool(true) => Ok(()),
            other => Err(format!(
                "{script}: {other}; {}",
                self.run("return document.body.innerText")
            )),
        });
    }

    /// Keeps a picture, if somebody wants them: as PNG, and as the definition that the
    /// guide has. (A page of documentation can have no files beside it.)
    fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("BOWLINE_PICTURES") else {
            return;
        };
        let folder = PathBuf::from(folder);
        let picture = self.of_session("GET", "screenshot", &Value::Null);
        let picture = picture.as_str().unwrap();
        let decoded = Command::new("base64")
            .arg("--decode")
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(folder.join(format!("{name}.png"))).unwrap())
            .spawn();
        let mut decoded = decoded.unwrap();
        let text = picture.as_bytes();
        decoded.stdin.take().unwrap().write_all(text).unwrap();
        assert!(decoded.wait().unwrap().success());
        self.define(name, &folder, &json!({"format": "webp", "quality": 40}));
    }

    /// The same of a part of the page, as the definition for the guide alone: from the
    /// first to the last of what the selector finds.
    fn picture_of(&self, name: &str, selector: &str) {
        let Some(folder) = std::env::var_os("BOWLINE_PICTURES") else {
            return;
        };
        // Nothing moves between the look at where it is and the picture.
        self.run("source.onmessage = null");
        let size = json!({"width": 1_300, "height": 1_000});
        self.of_session("POST", "window/rect", &size);
        self.until("return window.innerWidth > 1200");
        let clip = self.run(&format!(
            "const all = [...document.querySelectorAll(\"{selector}\")]\
             .map(it => it.getBoundingClientRect());\
             const edge = (of, side) => of(...all.map(it => it[side]));\
             const [left, top] = [edge(Math.min, 'left'), edge(Math.min, 'top')];\
             return {{x: scrollX + left - 6, y: scrollY + top - 6, scale: 0.75,\
             width: edge(Math.max, 'right') - left + 12,\
             height: edge(Math.max, 'bottom') - top + 12}}"
        ));
        let shot = json!({
            "format": "webp", "quality": 50, "clip": clip, "captureBeyondViewport": true,
        });
        self.define(name, Path::new(&folder), &shot);
        self.run("source.onmessage = message => take(JSON.parse(message.data))");
    }

    fn define(&self, name: &str, folder: &Path, shot: &Value) {
        let shot = json!({"cmd": "Page.captureScreenshot", "params": shot});
        let shot = self.of_session("POST", "goog/cdp/execute", &shot);
        let data = shot["data"].as_str().unwrap();
        let definition = format!("[{name}-picture]: data:image/webp;base64,{data}\n");
        std::fs::write(folder.join(format!("{name}.md")), definition).unwrap();
    }

    /// Has the page look as the machine does, `dark` or `light`.
    fn emulate_dark(&self, scheme: &str) {
        let media = json!({"cmd": "Emulation.setEmulatedMedia", "params": {
            "features": [{"name": "prefers-color-scheme", "value": scheme}],
        }});
        self.of_session("POST", "goog/cdp/execute", &media);
    }

    /// Presses a key, by WebDriver's name for it, until a script answers true.
    fn press(&self, key: char, script: &str) {
        self.press_all(&[key], script);
    }

    fn press_with_shift(&self, key: char, script: &str) {
        self.press_all(&['\u{e008}', key], script);
    }

    #[track_caller]
    fn press_all(&self, keys: &[char], script: &str) {
        let down = keys
            .iter()
            .map(|key| json!({"type": "keyDown", "value": key}));
        let up = keys.iter().rev();
        let up = up.map(|key| json!({"type": "keyUp", "value": key}));
        let steps: Vec<_> = down.chain(up).collect();
        let actions = json!({"actions": [{"type": "key", "id": "keyboard", "actions": steps}]});
        for _ in 0..200 {
            self.of_session("POST", "actions", &actions);
            if self.run(script) == Value::Bool(true) {
                return;
            }
        }
        panic!(
            "{script}: {}",
            self.run("return document.activeElement.outerHTML")
        );
    }

    /// Has the page as high as what is on it, for a picture of it all.
    fn fit(&self) {
        let height = self.run("return document.documentElement.scrollHeight");
        let height = height.as_u64().unwrap().clamp(600, 1_300) + 120;
        let size = json!({"width": 1_000, "height": height});
        self.of_session("POST", "window/rect", &size);
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() && !std::thread::panicking() {
            let path = format!("/session/{}", self.session);
            self.call("DELETE", &path, &Value::Null);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// The row of the echo's connection, as the page shows it, with a cell's text.
fn cell(column: usize) -> String {
    format!(
        "return [...document.querySelectorAll('#all tbody tr')]\
         .filter(row => row.cells[1].textContent === 'Echo' && row.cells[0].textContent === 'UNIX')\
         .map(row => row.cells[{column}].textContent).join()"
    )
}

#[test]
fn a_browser_shows_a_connection_its_bytes_a_pause_and_a_slow_callback() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let program = Program::start();
    browser.open(&program.page);
    browser.until("return document.getElementById('state').textContent === 'live'");
    let received = cell(6);
    let shows = |what: &str| {
        format!(
            "{} === '{what}'",
            received.replacen("return ", "return (", 1) + ")"
        )
    };
    let mut client = program.connect();
    browser.until(&shows("5"));
    say(&mut client, b"and more");
    browser.until(&shows("13"));
    say(&mut client, b"slow");
    browser.until(
        "return [...document.querySelectorAll('#slow tbody tr')]\
         .some(row => row.cells[2].textContent.startsWith('Echo,UNIX'))",
    );
    // The turn is on the timeline of the slowest, with what ran in it.
    say(&mut client, b"slow");
    browser.until("return document.querySelectorAll('#timeline button').length > 1");
    let turn = "[...document.querySelectorAll('#timeline button')]\
                .find(it => it.title.includes('ready of Echo,UNIX'))";
    browser.until(&format!("return Boolean({turn})"));
    browser.until(&format!(
        "{turn}.focus();\
         return [...document.querySelectorAll('#ran li')]\
         .some(it => it.textContent.startsWith('ready of Echo,UNIX'))"
    ));
    let mut flooded = connect(&program.echo);
    flooded.write_all(b"flood").unwrap();
    browser.until(
        "return [...document.querySelectorAll('#all tbody tr')]\
         .some(row => row.innerText.includes('producer=push, paused'))",
    );
    drop(flooded);
    say(&mut client, b"pause");
    browser.until(&format!(
        "return ({}) === 'paused'",
        &cell(3)["return ".len()..]
    ));
    // The listener has what all of its connections did, and who has paused one.
    browser.until(
        "return [...document.querySelectorAll('#all tbody tr')]\
         .some(row => row.cells[0].textContent === 'listener'\
         && row.cells[1].textContent === 'Echo' && row.cells[6].textContent === '31'\
         && row.cells[10].textContent.startsWith('2 accepted · 1 open, 1 paused by the protocol'))",
    );
    browser.fit();
    browser.picture("page");
    // Rows can be filtered, by keyboard too.
    browser.run(
        "const filter = document.getElementById('filter'); filter.focus();\
         filter.value = 'listener'; filter.dispatchEvent(new Event('input'));",
    );
    browser.until(
        "return [...document.querySelectorAll('#all tbody tr')]\
         .every(row => row.cells[0].textContent === 'listener')",
    );
    browser.run(
        "const filter = document.getElementById('filter');\
         filter.value = ''; filter.dispatchEvent(new Event('input'));",
    );
    is_used_by_keyboard_alone(&browser);
    // In the dark it is dark.
    browser.emulate_dark("dark");
    browser.until(
        "const style = getComputedStyle(document.body);\
         const ink = getComputedStyle(document.documentElement).getPropertyValue('--ink');\
         return style.color === 'rgb(255, 255, 255)' && ink.trim() === '#7af'",
    );
    browser.emulate_dark("light");
    browser.until("return getComputedStyle(document.body).color === 'rgb(0, 0, 0)'");
    // A phone has no room for all, and nothing but the tables scrolls sideways.
    let phone = json!({"width": 390, "height": 844});
    browser.of_session("POST", "window/rect", &phone);
    browser.until("return document.documentElement.scrollWidth <= window.innerWidth");
    browser.emulate_dark("dark");
    browser.picture("phone");
}

const TABLE: &str = "section[aria-label='Descriptors']";
const PLOTS: &str = "header, section[aria-label='Plots']";

/// Each has a picture in the guide.
#[test]
fn a_browser_shows_a_new_connection_its_growth_a_paused_producer_and_a_slow_callback() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let program = Program::start();
    browser.open(&program.page);
    let none = format!("return ({}) === ''", &cell(0)["return ".len()..]);
    browser.until("return document.getElementById('state').textContent === 'live'");
    browser.until(&none);
    // It was just made: it is there, with its first bytes, and younger than a minute.
    let mut client = program.connect();
    let received = |count: &str| {
        let received = &cell(6)["return ".len()..];
        format!("return ({received}) === '{count}'")
    };
    browser.until(&received("5"));
    let age = &cell(9)["return ".len()..];
    browser.until(&format!("return /^[\\d.]+ (µs|ms|s)$/.test({age})"));
    browser.picture_of("made", TABLE);
    // Its bytes grow, in its row and on the plots.
    let mut count = 5_u64;
    for round in 1..=5 {
        say(&mut client, &vec![b'x'; round * 1_000]);
        count += round as u64 * 1_000;
        browser.until(&received(&format!("{:.1} K", count as f64 / 1_000.0)));
    }
    for plot in ["received", "sent"] {
        browser.until(&format!(
            "return document.getElementById('path-{plot}').getAttribute('d')\
             .split(/[LM]/).filter(it => it && Number(it.split(',')[1]) < 38).length > 1"
        ));
    }
    browser.picture_of("growing", PLOTS);
    let mut flooded = connect(&program.echo);
    flooded.write_all(b"flood").unwrap();
    browser.until(
        "return [...document.querySelectorAll('#all tbody tr')]\
         .some(row => row.innerText.includes('producer=push, paused'))",
    );
    browser.run("document.getElementById('all').parentElement.scrollLeft = 1e6");
    browser.picture_of("paused", TABLE);
    drop(flooded);
    say(&mut client, b"slow");
    browser.until(
        "return [...document.querySelectorAll('#slow tbody tr')]\
         .some(row => row.cells[2].textContent.startsWith('Echo,UNIX'))",
    );
    browser.picture_of("slow", "section[aria-label='Slow callbacks']");
}

/// The table is ordered, and a slow turn chosen, without a mouse.
fn is_used_by_keyboard_alone(browser: &Browser) {
    const ORDER: &str = "[...document.querySelectorAll('#all th')]\
        .find(it => it.textContent === 'received').getAttribute('aria-sort')";
    browser.press(
        '\u{e004}',
        "return document.activeElement.textContent === 'received'",
    );
    for order in ["ascending", "descending"] {
        browser.press('\u{e007}', &format!("return {ORDER} === '{order}'"));
    }
    // Backwards, past the filter.
    browser.run("document.querySelector('#timeline button').focus()");
    browser.until("return document.querySelector('#timeline .chosen').previousSibling === null");
    browser.press(
        '\u{e004}',
        "return document.activeElement.textContent === 'received'",
    );
    browser.press_with_shift(
        '\u{e004}',
        "return document.activeElement.parentElement.id === 'timeline'",
    );
    browser.until(
        "return document.activeElement.className === 'chosen'\
         && document.activeElement.previousSibling !== null",
    );
}

#[test]
fn a_browser_goes_on_after_the_program_was_restarted() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let secret = "0123456789abcdef";
    let program = Program::start_with(Some((([127, 0, 0, 1], 0).into(), secret)));
    let (page, address) = (program.page.clone(), program.address());
    browser.open(&page);
    browser.until("return document.getElementById('state').textContent === 'live'");
    drop(program);
    browser.until("return document.getElementById('state').className === 'lost'");
    let program = Program::start_with(Some((address, secret)));
    assert_eq!(program.page, page);
    let _client = program.connect();
    browser.until("return document.getElementById('state').textContent === 'live'");
    browser.until(&format!("return ({}) === '5'", &cell(6)["return ".len()..]));
    // What was plotted before stays.
    browser.until(
        "return document.getElementById('path-turns').getAttribute('d').split('L').length > 3",
    );
    browser.picture_of("again", PLOTS);
}

/// An example server with a page, ended with this value, and its successors by the test.
pub(crate) struct Server {
    process: Child,
    pub(crate) page: String,
    pub(crate) address: String,
}

const SECRET: &str = "0123456789abcdef";

impl Server {
    pub(crate) fn start(name: &str, arguments: &[&str]) -> Self {
        let process = Command::new(example(name))
            .args(arguments)
            .args(["--inspect", "127.0.0.1:0"])
            .env("INSPECT_SECRET", SECRET)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut process = process.unwrap();
        Self {
            page: said(process.stderr.take().unwrap(), "look inside at "),
            address: said(process.stdout.take().unwrap(), "listening on "),
            process,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have handed over, and ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a server says first. The processes that follow it say so too.
fn said(output: impl Read + Send + 'static, what: &str) -> String {
    let mut output = BufReader::new(output);
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let place = line.trim_end().strip_prefix(what);
    let place = place
        .unwrap_or_else(|| panic!("{line:?}, not {what:?}"))
        .to_owned();
    std::thread::spawn(move || output.lines().for_each(drop));
    place
}

/// The example, built if it is not there yet: `cargo test` of everything builds it, that
/// of one test does not.
pub(crate) fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples");
    path.push(name);
    if !path.exists() {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--example", name])
            .status();
        assert!(built.unwrap().success());
    }
    path
}

/// A client of `hot_restart`, whose answers say which process they are of.
pub(crate) struct Client(BufReader<UnixStream>);

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = eventually(PATIENCE, || UnixStream::connect(path));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    /// Says a line; the process that answers.
    pub(crate) fn say(&mut self, line: &str) -> i32 {
        self.0
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        let pid = answer.trim_end().strip_prefix(line).map(str::trim);
        pid.and_then(|pid| pid.parse().ok())
            .unwrap_or_else(|| panic!("{answer:?}"))
    }
}

/// Ends the last of the processes, which nobody waits for.
pub(crate) struct Last(pub(crate) Option<rustix::process::Pid>);

impl Drop for Last {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // It may be gone.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// How many connections a neighbour has, as the page shows it.
fn between(pid: i32, words: &str) -> String {
    format!(
        "return [...document.querySelectorAll('.neighbour')]\
         .some(it => it.dataset.pid === '{pid}' && it.innerText.includes('{words}'))"
    )
}

#[test]
fn a_browser_shows_a_restart_whose_connections_move_between_two_processes() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (control, socket) = (at("control"), at("socket"));
    let arguments = [
        "--serve",
        "--move",
        "--directory",
        &control,
        "--unix",
        &socket,
    ];
    let server = Server::start("hot_restart", &arguments);
    let mut clients: Vec<_> = (0..40).map(|_| Client::connect(socket.as_ref())).collect();
    let first = clients.iter_mut().map(|it| it.say("one")).max().unwrap();
    let mut last = Last(None);
    browser.open(&server.page);
    browser.until("return document.getElementById('state').textContent === 'live'");
    let shows =
        |pid: i32| format!("return document.getElementById('who').textContent === 'process {pid}'");
    browser.until(&shows(first));
    browser.until("return document.body.innerText.includes('movable 40')");
    let mut before = first;
    for round in ["two", "three"] {
        let pid = rustix::process::Pid::from_raw(before);
        rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::HUP).unwrap();
        let after = eventually(PATIENCE, || match clients[0].say(round) {
            pid if pid == before => Err("the first process answers"),
            pid => Ok(pid),
        });
        last.0 = rustix::process::Pid::from_raw(after);
        for client in &mut clients {
            assert_eq!(client.say(round), after, "a connection has stayed");
        }
        // The page has gone on with the next process, and knows what came from the one before.
        browser.until(&shows(after));
        browser.until("return document.getElementById('state').textContent === 'live'");
        browser.until(&between(before, "40 connections moved"));
        before = after;
    }
    // Of the first it knows by itself alone: it was there when the page was.
    browser.until(&between(first, "gone"));
    browser.fit();
    browser.picture("restart");
    drop(clients);
}

#[test]
fn a_browser_shows_a_pool_and_what_passes_to_its_workers() {
    let Some(browser) = Browser::start() else {
        return;
    };
    let server = Server::start("prefork", &["--serve", "--workers", "3"]);
    browser.open(&server.page);
    let workers = "[...document.querySelectorAll('.neighbour')].filter(it => /worker \\d+/.test(it.innerText))";
    browser.until(&format!(
        "return {workers}.length === 3 && {workers}.every(it => it.innerText.includes('serving'))"
    ));
    for _ in 0..30 {
        let mut client = TcpStream::connect(&server.address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(client.read(&mut [0; 100]).unwrap() > 0, "it was answered");
    }
    let passed = "Number((/(\\d+) connections passed/.exec(it.innerText) || [])[1])";
    browser.until(&format!(
        "return {workers}.reduce((all, it) => all + {passed}, 0) === 30"
    ));
    browser.until("return document.body.innerText.includes('acknowledged 30')");
    browser.until("return document.body.innerText.includes('3 open, 30 descriptors out')");
    browser.fit();
    browser.picture("pool");
}
