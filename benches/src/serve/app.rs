//! `flyrun serve` with one app, and machines without it.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::load;

/// Where `flyrun serve` listens.
const PORT: u16 = 18080;
/// The one machine of the app, as `flyrun serve` calls it.
const MACHINE: &str = "hello-app-0";
/// What it says, in its directory.
const LOG: &str = "log";
const ATTEMPTS: usize = 600;
const PAUSE: Duration = Duration::from_millis(100);

/// The program flyrun, with the image of the web server.
#[derive(Clone, Copy, Debug)]
pub struct Flyrun<'a> {
    /// The program.
    pub program: &'a Path,
    /// The image.
    pub image: &'a str,
    /// Where the web server listens.
    pub port: u16,
}

impl Flyrun<'_> {
    fn run(&self, words: &[&str]) -> Result<String> {
        let output = Command::new(self.program).args(words).stdin(Stdio::null()).output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "flyrun {} ended with {}: {told}", words.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether this flyrun serves apps at all.
    pub fn can_serve(&self) -> bool {
        self.run(&["serve", "--help"]).is_ok()
    }

    fn inspect(&self, machine: &str) -> Result<Value> {
        let inspected: Value = serde_json::from_str(&self.run(&["inspect", machine])?)?;
        inspected.get(0).cloned().context("inspect tells of no machine")
    }

    /// Where a machine's web server is.
    pub fn address(&self, machine: &str) -> Result<SocketAddr> {
        let inspected = self.inspect(machine)?;
        let address = inspected["network"]["ipv4"].as_str().context("the machine has no address")?;
        Ok((address.parse::<IpAddr>()?, self.port).into())
    }
}

/// A machine of `flyrun run`, removed when it is dropped.
#[derive(Debug)]
pub struct Machine<'a> {
    flyrun: Flyrun<'a>,
    name: &'static str,
}

impl<'a> Machine<'a> {
    /// Starts it, and waits until it answers.
    pub fn start(flyrun: Flyrun<'a>) -> Result<Self> {
        let name = "bench-backend";
        flyrun.run(&["run", "-d", "--name", name, flyrun.image])?;
        let machine = Self { flyrun, name };
        let address = machine.address()?;
        wait(|| load::first_byte(address).map(|_| true).or_else(not_yet))
            .context("the machine does not answer")?;
        Ok(machine)
    }

    /// Where its web server is.
    pub fn address(&self) -> Result<SocketAddr> {
        self.flyrun.address(self.name)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _gone_already = self.flyrun.run(&["rm", "-f", self.name]);
    }
}

/// A `flyrun serve` with the app, which ends with its machine when it is dropped.
#[derive(Debug)]
pub struct Serve<'a> {
    flyrun: Flyrun<'a>,
    child: Child,
    directory: tempfile::TempDir,
}

impl<'a> Serve<'a> {
    /// Starts it. `auto_stop` is what becomes of a machine that is idle for a second.
    pub fn start(flyrun: Flyrun<'a>, auto_stop: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("fly.toml");
        std::fs::write(&file, fly_toml(flyrun, auto_stop))?;
        let log = File::create(directory.path().join(LOG))?;
        let mut command = Command::new(flyrun.program);
        command.arg("serve").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().context("flyrun serve cannot be started")?;
        let mut serve = Self { flyrun, child, directory };
        // A request at once: that there is an answer means that it serves.
        wait(|| match serve.child.try_wait()? {
            Some(status) => bail!("flyrun serve ended with {status}"),
            None => load::first_byte(serve.address()).map(|_| true).or_else(not_yet),
        })
        .with_context(|| format!("flyrun serve does not answer; it says: {}", serve.log()))?;
        Ok(serve)
    }

    /// What it has told.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join(LOG)).unwrap_or_default()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, PORT).into()
    }

    /// Where the machine's web server is.
    pub fn machine(&self) -> Result<SocketAddr> {
        self.flyrun.address(MACHINE)
    }

    /// Waits until the machine is idle no longer, but in this state.
    pub fn wait_until(&self, state: &str) -> Result<()> {
        wait(|| Ok(self.flyrun.inspect(MACHINE)?["state"] == state))
            .with_context(|| format!("{MACHINE} does not become {state}"))
    }

    /// How the machine came to run the last time.
    pub fn last_start(&self) -> Result<String> {
        let kind = self.flyrun.inspect(MACHINE)?["last_start"]["kind"].clone();
        Ok(kind.as_str().context("it was never started")?.to_string())
    }
}

impl Drop for Serve<'_> {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped_already = self.child.wait();
        let _gone_too = self.flyrun.run(&["rm", "-f", MACHINE]);
    }
}

fn fly_toml(Flyrun { image, port, .. }: Flyrun<'_>, auto_stop: &str) -> String {
    format!(
        "app = 'hello'\nbuild.image = '{image}'\n\
         [[services]]\ninternal_port = {port}\nauto_stop_machines = '{auto_stop}'\n\
         ports = [{{ port = {PORT}, handlers = ['http'] }}]\n\
         [flyrun]\nidle_timeout = '1s'\nhostnames = ['{}']\n",
        load::HOST
    )
}

/// Nobody listens yet; any other failure stays one.
fn not_yet(error: anyhow::Error) -> Result<bool> {
    let is_refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    if error.downcast_ref().is_some_and(is_refused) { Ok(false) } else { Err(error) }
}

fn wait(mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    for _ in 0..ATTEMPTS {
        if is_so()? {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    bail!("it has not come true in {} s", ATTEMPTS * PAUSE.as_millis() as usize / 1000)
}
