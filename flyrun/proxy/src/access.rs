//! What is told of each request and each raw connection when it is over.

use std::fmt::Write as _;
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
        let _ = write!(line, "{{\"time\":\"{time}\"");
        put_text(line, ",\"id\":", self.id);
        for (key, text) in
            [(",\"app\":", self.app), (",\"instance\":", self.instance), (",\"error\":", self.error)]
        {
            if let Some(text) = text {
                put_text(line, key, text);
            }
        }
        let _ = write!(line, ",\"client\":\"{}\"", self.client);
        put_number(line, ",\"port\":", self.port.into());
        put_text(line, ",\"protocol\":", self.protocol);
        if self.status != 0 {
            put_text(line, ",\"method\":", self.method);
            put_text(line, ",\"host\":", self.host);
            put_text(line, ",\"path\":", self.path);
            put_number(line, ",\"status\":", self.status.into());
        }
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        put_number(line, ",\"received\":", self.received);
        put_number(line, ",\"sent\":", self.sent);
        put_number(line, ",\"duration_us\":", micros(self.duration));
        put_number(line, ",\"waited_us\":", micros(self.waited));
        put_number(line, ",\"attempts\":", self.attempts.into());
        line.push_str("}\n");
    }
}

fn put_number(line: &mut String, key: &str, number: u64) {
    line.push_str(key);
    let mut digits = [0; 20];
    let digits = crate::h1::decimal(number, &mut digits);
    line.push_str(std::str::from_utf8(digits).unwrap_or("0"));
}

/// A JSON string.
fn put_text(line: &mut String, key: &str, text: &str) {
    line.push_str(key);
    line.push('"');
    // Most texts need no look at their characters.
    let is_plain = |byte: u8| (0x20..0x7f).contains(&byte) && byte != b'"' && byte != b'\\';
    if text.bytes().all(is_plain) {
        line.push_str(text);
    } else {
        for c in text.chars() {
            match c {
                '"' | '\\' => line.extend(['\\', c]),
                c if c.is_control() => {
                    let _ = write!(line, "\\u{:04x}", u32::from(c));
                }
                c => line.push(c),
            }
        }
    }
    line.push('"');
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
