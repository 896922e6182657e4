//! What is told of each request and each raw connection when it is over.

use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

/// Where records go. It is called by the tasks that serve, so it must not block.
pub trait Log: Send + Sync + 'static {
    /// A request was answered, or a raw connection is over.
    fn access(&self, record: &Record<'_>);

    /// Something that no request tells: one sentence.
    fn trouble(&self, what: &str);
}

/// A request, or a raw connection, that is over.
#[derive(Clone, Debug)]
pub struct Record<'r> {
    /// When it began.
    pub time: SystemTime,
    /// Finds it: `Fly-Request-Id`, and in the body of an answer that no machine gave.
    pub id: &'r str,
    /// The app, if one was found.
    pub app: Option<&'r str>,
    /// Who asked.
    pub client: IpAddr,
    /// The port of this host.
    pub port: u16,
    /// `HTTP/1.0`, `HTTP/1.1`, `HTTP/2` or `TCP`.
    pub protocol: &'r str,
    /// Empty for a raw connection, as the next two.
    pub method: &'r str,
    /// The authority.
    pub host: &'r str,
    /// The path, without the query, which may have secrets.
    pub path: &'r str,
    /// What the client was answered; 499 if it did not wait for it, 0 for a raw connection.
    pub status: u16,
    /// Bytes of the body that came from the client.
    pub received: u64,
    /// Bytes of the body that went to it.
    pub sent: u64,
    /// From the head of the request to the end of the answer.
    pub duration: Duration,
    /// How much of it was waiting for a machine.
    pub waited: Duration,
    /// The machine that answered.
    pub instance: Option<&'r str>,
    /// How many machines or connections it was sent to.
    pub attempts: u32,
    /// Why the answer is the proxy's own or is not whole.
    pub error: Option<&'r str>,
}

impl Record<'_> {
    /// Appends a line of JSON.
    pub fn write_json(&self, line: &mut String) {
        let time = humantime::format_rfc3339_micros(self.time);
        let _ = write!(line, "{{\"time\":\"{time}\",\"id\":{}", Text(self.id));
        for (key, text) in [("app", self.app), ("instance", self.instance), ("error", self.error)] {
            if let Some(text) = text {
                let _ = write!(line, ",\"{key}\":{}", Text(text));
            }
        }
        let _ = write!(
            line,
            ",\"client\":\"{}\",\"port\":{},\"protocol\":{}",
            self.client,
            self.port,
            Text(self.protocol)
        );
        if self.status != 0 {
            let _ = write!(
                line,
                ",\"method\":{},\"host\":{},\"path\":{},\"status\":{}",
                Text(self.method),
                Text(self.host),
                Text(self.path),
                self.status
            );
        }
        let _ = writeln!(
            line,
            ",\"received\":{},\"sent\":{},\"duration_us\":{},\"waited_us\":{},\"attempts\":{}}}",
            self.received,
            self.sent,
            self.duration.as_micros(),
            self.waited.as_micros(),
            self.attempts
        );
    }
}

/// A JSON string.
struct Text<'t>(&'t str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        let mut rest = self.0;
        while let Some(at) = rest.find(|c: char| c == '"' || c == '\\' || c.is_control()) {
            let (plain, from) = rest.split_at(at);
            f.write_str(plain)?;
            let mut chars = from.chars();
            match chars.next() {
                Some(c @ ('"' | '\\')) => write!(f, "\\{c}")?,
                Some(c) => write!(f, "\\u{:04x}", u32::from(c))?,
                None => {}
            }
            rest = chars.as_str();
        }
        f.write_str(rest)?;
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_line_of_json_whatever_clients_write() {
        let record = Record {
            time: SystemTime::UNIX_EPOCH,
            id: "01",
            app: Some("shop"),
            client: "::1".parse().unwrap(),
            port: 80,
            protocol: "HTTP/1.1",
            method: "GET",
            host: "a\"b\\",
            path: "/\u{7f}\n\u{85}é",
            status: 200,
            received: 0,
            sent: 5,
            duration: Duration::from_micros(7),
            waited: Duration::ZERO,
            instance: None,
            attempts: 1,
            error: None,
        };
        let mut line = String::new();
        record.write_json(&mut line);
        assert_eq!(line.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["host"], "a\"b\\");
        assert_eq!(value["path"], "/\u{7f}\n\u{85}é");
        assert_eq!(value["time"], "1970-01-01T00:00:00.000000Z");
        assert_eq!(value["status"], 200);
    }
}
