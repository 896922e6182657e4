//! One client: a request after another, of all kinds, to apps of which some are asked more often.

use std::thread::sleep;
use std::time::{Duration, Instant};

use tests::http::{self, Fault};

use super::world::World;
use super::{APPS, Random, name};

/// Apps that get half of the requests.
const POPULAR: u64 = 4;
/// Bytes of an upload.
const LARGE: u64 = 200_000;

pub struct Client<'w> {
    world: &'w World,
    random: Random,
    /// To be used again, for whichever app.
    connection: Option<http::Client>,
}

impl<'w> Client<'w> {
    pub fn new(world: &'w World, random: Random) -> Client<'w> {
        Client { world, random, connection: None }
    }

    pub fn run(&mut self, end: Instant) {
        while Instant::now() < end && !self.world.has_failed() {
            self.ask();
            sleep(Duration::from_millis(100 + self.random.below(700)));
        }
    }

    fn ask(&mut self) {
        let popular = self.random.below(2) == 0;
        let app = self.random.below(if popular { POPULAR } else { APPS as u64 }) as usize;
        let host = format!("{}.test", name(app));
        let token = self.random.below(u64::MAX);
        let query = |seconds: &str| format!("{token}-{seconds}");
        let echoed = |query: &str, body: &str| format!(" {query}\n{body}end of {query}\n");
        let (kind, request, rest) = match self.random.below(10) {
            0..5 => ("page", http::get(&host, "/"), "\n".to_string()),
            5 | 6 => {
                let query = query("0");
                ("query", http::get(&host, &format!("/cgi-bin/echo?{query}")), echoed(&query, ""))
            }
            7 => {
                let query = query("1.5");
                ("slow", http::get(&host, &format!("/cgi-bin/echo?{query}")), echoed(&query, ""))
            }
            8 => {
                let query = query("0.1");
                let line = format!("{token}\n");
                let body = line.repeat((self.random.below(LARGE) / line.len() as u64) as usize + 1);
                let path = format!("/cgi-bin/echo?{query}");
                ("upload", http::post(&host, &path, body.as_bytes()), echoed(&query, &body))
            }
            _ => return self.leave_early(&http::get(&host, &format!("/cgi-bin/echo?{}", query("0.5")))),
        };
        let fresh = self.random.below(4) == 0;
        let connection = self.connection.take().filter(|_| !fresh);
        let asked = self.world.asks(app, kind, rest);
        let connection = connection.map_or_else(|| http::Client::connect(80), Ok);
        let Ok(mut connection) = connection else {
            return self.world.judges(&asked, asked.begun, Err(Fault::Unanswered(connection.unwrap_err())));
        };
        let since = connection.since;
        let result = connection.ask(&request);
        if result.as_ref().is_ok_and(|answer| answer.field("connection") != Some("close")) {
            self.connection = Some(connection);
        }
        let is_answered = result.is_ok();
        self.world.judges(&asked, since, result);
        if !is_answered {
            // Nobody may be there for a while.
            sleep(Duration::from_secs(1));
        }
    }

    /// Sends a request, and does not wait for the answer.
    fn leave_early(&mut self, request: &[u8]) {
        if let Ok(mut connection) = http::Client::connect(80) {
            let _ = connection.send(request);
            sleep(Duration::from_millis(self.random.below(1000)));
        }
        self.world.counts("client left early");
    }
}
