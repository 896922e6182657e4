//! Many clients, several apps, machines that come and go: no answer is wrong, and none is another's.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::fake::{Client, Stage, canned, eventually, field, http_app, length, read_head};

#[tokio::test]
async fn hundreds_of_requests_wait_for_one_machine_and_all_are_answered() {
    let (_, backend) = canned("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let stage = Stage::new(&http_app(""), backend).await;
    let (open, gate) = watch::channel(false);
    *stage.fake.gate.lock().unwrap() = Some(gate);
    let address = stage.listen(80).await;
    let clients: Vec<_> = (0..300)
        .map(|_| {
            tokio::spawn(async move {
                let mut client = Client(TcpStream::connect(address).await.unwrap());
                client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
                client.answer().await.1
            })
        })
        .collect();
    eventually(|| (stage.fake.waiting.load(SeqCst) == 300).then_some(())).await;
    open.send_replace(true);
    for client in clients {
        assert_eq!(client.await.unwrap(), "ok");
    }
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
}

/// A small generator: tests that fail can be run again with the same numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Answers what it was asked, in one framing or another, and now and then breaks off.
async fn moody(mut stream: TcpStream, who: &'static str, random: Arc<Mutex<Random>>) {
    let mut pending = Vec::new();
    while let Some(head) = read_head(&mut stream, &mut pending).await {
        let mut body = vec![0; length(&head)];
        let ahead = pending.len().min(body.len());
        body[..ahead].copy_from_slice(&pending[..ahead]);
        pending.drain(..ahead);
        if stream.read_exact(&mut body[ahead..]).await.is_err() {
            return;
        }
        let what =
            format!("{who} {} {}", field(&head, "x-number").unwrap(), String::from_utf8(body).unwrap());
        let dice = random.lock().unwrap().below(20);
        let answer = match dice {
            0 => return,
            1 => format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}",
                what.len(),
                &what[..what.len() / 2]
            ),
            2..8 => format!(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{what}\r\n0\r\n\r\n",
                what.len()
            ),
            8 => format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{what}"),
            _ => format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{what}", what.len()),
        };
        if dice > 16 {
            tokio::time::sleep(Duration::from_millis(dice)).await;
        }
        if stream.write_all(answer.as_bytes()).await.is_err() || dice == 1 || dice == 8 {
            return;
        }
    }
}

/// The body of an answer that is whole, if it came.
async fn ask(address: std::net::SocketAddr, app: &str, number: u64, body: &str) -> Option<(u16, String)> {
    let mut client = Client(TcpStream::connect(address).await.unwrap());
    let method = if body.is_empty() { "GET" } else { "POST" };
    client
        .send(format!(
            "{method} / HTTP/1.1\r\nHost: {app}.example\r\nX-Number: {number}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    let all = client.rest().await;
    let (head, body) = all.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if let Some(length) = field(head, "content-length") {
        return (body.len() == length.parse::<usize>().unwrap()).then(|| (status, body.to_string()));
    }
    let (_, rest) = body.split_once("\r\n")?;
    let data = rest.strip_suffix("\r\n0\r\n\r\n")?;
    Some((status, data.to_string()))
}

#[tokio::test]
async fn machines_that_come_and_go_never_make_a_wrong_answer() {
    let random = Arc::new(Mutex::new(Random(0x5eed)));
    let stage = Stage::new(&http_app(""), |_| async {}).await;
    let mut machines = Vec::new();
    for (app, id) in [("one", "one1"), ("one", "one2"), ("two", "two1"), ("two", "two2"), ("three", "three1")]
    {
        let random = random.clone();
        machines.push(stage.machine(app, id, move |stream| moody(stream, app, random.clone())).await);
    }
    let texts = ["one", "two", "three"].map(|app| {
        http_app(&format!("[flyrun]\nhostnames = ['{app}.example']\n")).replace("'shop'", &format!("'{app}'"))
    });
    stage.serve(&[&texts[0], &texts[1], &texts[2]]);
    let address = stage.listen(80).await;
    let (whole, failed, is_over) =
        (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let clients: Vec<_> = (1..=8)
        .map(|client| {
            let (whole, failed) = (whole.clone(), failed.clone());
            tokio::spawn(async move {
                let mut random = Random(client * 7919);
                for turn in 0..100 {
                    let app = ["one", "two", "three"][random.below(3) as usize];
                    let number = client * 1000 + turn;
                    let body = "b".repeat(random.below(3) as usize * 700);
                    match ask(address, app, number, &body).await {
                        Some((200, answer)) => {
                            assert_eq!(answer, format!("{app} {number} {body}"));
                            whole.fetch_add(1, SeqCst);
                        }
                        Some((status, why)) => {
                            assert!(
                                [502, 503, 504].contains(&status) && why.contains("(id "),
                                "{status} {why}"
                            );
                            failed.fetch_add(1, SeqCst);
                        }
                        // Broken off, visibly.
                        None => {
                            failed.fetch_add(1, SeqCst);
                        }
                    }
                }
            })
        })
        .collect();
    let lives = async {
        while !is_over.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(3)).await;
            let which = random.lock().unwrap().below(machines.len() as u64) as usize;
            machines[which].next_life();
            // A reload in between changes nothing.
            stage.serve(&[&texts[0], &texts[1], &texts[2]]);
        }
    };
    let done = async {
        for client in clients {
            client.await.unwrap();
        }
        is_over.store(true, SeqCst);
    };
    tokio::join!(lives, done);
    let (whole, failed) = (whole.load(SeqCst), failed.load(SeqCst));
    assert!(whole > 400, "{whole} whole, {failed} not");
    for machine in &machines {
        eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
    }
    assert_eq!(stage.drain().await.cut, 0);
}
