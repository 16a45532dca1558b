//! The page in a real browser, which is driven through WebDriver.
//!
//! With `BOWLINE_PICTURES=FOLDER` each test leaves a picture of the page there; those of
//! `inspect/pictures` were made so.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::{Program, not_run, say};

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

    /// Keeps a picture, if somebody wants them.
    fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("BOWLINE_PICTURES") else {
            return;
        };
        let picture = self.of_session("GET", "screenshot", &Value::Null);
        let path = PathBuf::from(folder).join(name);
        let decoded = Command::new("base64")
            .arg("--decode")
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(path).unwrap())
            .spawn();
        let mut decoded = decoded.unwrap();
        let text = picture.as_str().unwrap().as_bytes();
        decoded.stdin.take().unwrap().write_all(text).unwrap();
        assert!(decoded.wait().unwrap().success());
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
    say(&mut client, b"pause");
    browser.until(&format!(
        "return ({}) === 'paused'",
        &cell(3)["return ".len()..]
    ));
    browser.picture("page.png");
    // Rows can be filtered, by keyboard too.
    browser.run(
        "const filter = document.getElementById('filter'); filter.focus();\
         filter.value = 'listener'; filter.dispatchEvent(new Event('input'));",
    );
    browser.until(
        "return [...document.querySelectorAll('#all tbody tr')]\
         .every(row => row.cells[0].textContent === 'listener')",
    );
    // A phone has no room for all, and nothing but the tables scrolls sideways.
    let phone = json!({"width": 390, "height": 844});
    browser.of_session("POST", "window/rect", &phone);
    browser.until("return document.documentElement.scrollWidth <= window.innerWidth");
    browser.picture("phone.png");
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
}
