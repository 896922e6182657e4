//! Debian's Chromium, driven by its DevTools protocol over two pipes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

/// After this long it hangs, whatever the machine is busy with.
const LIMIT: Duration = Duration::from_secs(120);
/// Attempts, 50 ms apart, at what is to come true.
const ATTEMPTS: usize = 2400;

/// Without these it talks to Google, and needs what a root without a desktop has not.
const FLAGS: &str = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
                     --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe";

/// One browser with one page.
pub struct Chromium {
    child: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    session: String,
    next: u64,
    complaints: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Chromium {
    /// Starts it. For its pages it is always this time, in milliseconds since the epoch.
    pub fn start(now_ms: u64) -> Chromium {
        let profile = tempfile::tempdir().unwrap();
        // It speaks on descriptors 3 and 4.
        let script = format!(
            "exec chromium {FLAGS} --user-data-dir=\"$1\" about:blank 3<&0 4>&1 0< /dev/null 1> /dev/null"
        );
        let mut child = Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = child.stdout.take().unwrap();
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                if sender.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
            }
        });
        let (session, complaints) = (String::new(), Vec::new());
        let mut browser =
            Chromium { child, input, messages, session, next: 0, complaints, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].as_str().unwrap().to_string();
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            browser.call(domain, json!({}));
        }
        let source = format!("Date.now = () => {now_ms};");
        browser.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": source }));
        browser
    }

    /// Asks it, and waits for the answer.
    #[track_caller]
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.clone().into();
        }
        self.input.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let told = "is chromium installed? tests/setup does it";
            let answer = self.messages.recv_timeout(LIMIT).expect(told);
            self.hear(&answer);
            if answer["id"] == self.next {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    /// Keeps what the page's console says, and what the browser holds against it.
    fn hear(&mut self, message: &Value) {
        let params = &message["params"];
        match message["method"].as_str() {
            Some("Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded") => {
                self.complaints.push(params.to_string());
            }
            Some("Page.javascriptDialogOpening") => self.complaints.push("a dialog".into()),
            _ => {}
        }
    }

    /// Opens a page as wide as that, in one of the two schemes of colours.
    pub fn open(&mut self, url: &str, width: u32, scheme: &str) {
        let metrics = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
        self.call("Page.navigate", json!({ "url": url }));
        self.wait_for("document.readyState === 'complete' && document.querySelector('.live') !== null");
    }

    /// The value of an expression in the page.
    #[track_caller]
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true });
        let result = self.call("Runtime.evaluate", params);
        assert!(result.get("exceptionDetails").is_none(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub fn wait_for(&mut self, expression: &str) {
        for _ in 0..ATTEMPTS {
            if self.evaluate(expression) == true {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let text = self.evaluate("document.body.innerText");
        panic!("this does not come true: {expression}\nthe page says: {text}\nand: {:?}", self.complaints);
    }

    /// What console and browser have complained about.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// A picture of the whole page for whoever wants to look, in the directory that FLYRUN_PAGE_PICTURES names.
    pub fn picture(&mut self, name: &str) {
        use base64::Engine as _;
        let Some(directory) = std::env::var_os("FLYRUN_PAGE_PICTURES") else { return };
        let taken = self.call("Page.captureScreenshot", json!({ "captureBeyondViewport": true }));
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(taken["data"].as_str().unwrap()).unwrap();
        std::fs::write(std::path::Path::new(&directory).join(format!("{name}.png")), bytes).unwrap();
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // With its pipe closed it would end too, in its own time.
        let _ = self.input.write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        for _ in 0..100 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
