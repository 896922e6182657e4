//! Raw connections.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use proxy::{Failure, Options};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake::{Client, Stage, eventually};

fn app(port: &str) -> String {
    format!(
        "app = 'shop'\n[build]\nimage = 'i'\n[[services]]\ninternal_port = PORT\n[[services.ports]]\nport = 5432\n{port}"
    )
}

async fn echo(mut stream: TcpStream) {
    let mut some = [0; 65536];
    while let Ok(count @ 1..) = stream.read(&mut some).await {
        stream.write_all(&some[..count]).await.unwrap();
    }
    stream.write_all(b" end").await.unwrap();
}

#[tokio::test]
async fn bytes_pass_both_ways_and_one_way_may_end_before_the_other() {
    let stage = Stage::new(&app(""), echo).await;
    let client = stage.connect(5432).await;
    let (mut read, mut write) = client.0.into_split();
    let sent: Vec<u8> = (0..20_000_000_u32).map(|n| (n % 251) as u8).collect();
    let expected = [sent.as_slice(), b" end"].concat();
    let send = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
        write
    });
    let mut got = Vec::new();
    read.read_to_end(&mut got).await.unwrap();
    assert!(got == expected, "{} bytes", got.len());
    drop(send.await.unwrap());
    let line = stage.line().await;
    assert_eq!((&line["protocol"], &line["received"]), (&"TCP".into(), &20_000_000.into()));
    assert_eq!((&line["instance"], &line["status"]), (&"m1".into(), &serde_json::Value::Null));
}

#[tokio::test]
async fn a_machine_may_speak_first_and_end_first() {
    let stage = Stage::new(&app(""), |mut stream: TcpStream| async move {
        stream.write_all(b"220 ready\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"late");
    })
    .await;
    let mut client = stage.connect(5432).await;
    assert_eq!(client.rest().await, "220 ready\r\n");
    assert_eq!(stage.first().leases.load(SeqCst), 1);
    client.send("late").await;
    drop(client);
    let line = stage.line().await;
    assert_eq!((&line["received"], &line["error"]), (&4.into(), &serde_json::Value::Null));
}

#[tokio::test]
async fn a_machine_is_told_who_is_there_before_anything_else() {
    for (version, length) in [("v1", 0), ("v2", 28)] {
        let handlers =
            format!("handlers = ['proxy_proto']\nproxy_proto_options = {{ version = '{version}' }}\n");
        let stage = Stage::new(&app(&handlers), |mut stream: TcpStream| async move {
            let mut some = [0; 4096];
            let count = stream.read(&mut some).await.unwrap();
            stream.write_all(&some[..count]).await.unwrap();
        })
        .await;
        let mut client = stage.connect(5432).await;
        let port = client.0.local_addr().unwrap().port();
        // The client has said nothing.
        let header = client.rest().await;
        if length == 0 {
            assert_eq!(header, format!("PROXY TCP4 127.0.0.1 127.0.0.1 {port} 5432\r\n"));
        } else {
            assert!(header.starts_with("\r\n\r\n\0\r\nQUIT\n"), "{header:?}");
        }
    }
}

#[tokio::test]
async fn a_life_that_ends_ends_its_connections() {
    let stage = Stage::new(&app(""), echo).await;
    let mut client = stage.connect(5432).await;
    client.send("abc").await;
    assert_eq!(client.exactly(3).await, b"abc");
    stage.first().next_life();
    client.rest().await;
    let machine = stage.first();
    eventually(|| (machine.leases.load(SeqCst) == 0).then_some(())).await;
}

#[tokio::test]
async fn nothing_to_connect_to_closes() {
    let stage = Stage::new(&app("").replace("PORT", "1"), echo).await;
    let mut client = stage.connect(5432).await;
    assert_eq!(client.rest().await, "");
    assert_eq!(*stage.fake.failures.lock().unwrap(), [("m1".to_string(), Failure::Connect)]);
    assert!(stage.line().await["error"].as_str().unwrap().starts_with("The app does not accept connections"));
}

#[tokio::test]
async fn connections_on_which_nothing_moves_are_closed() {
    let options = Options { tcp_idle_timeout: Duration::from_millis(200), ..Options::default() };
    let stage = Stage::with(&app(""), options, echo).await;
    let mut client = Client(TcpStream::connect(stage.listen(5432).await).await.unwrap());
    for _ in 0..5 {
        client.send("abc").await;
        assert_eq!(client.exactly(3).await, b"abc");
        tokio::time::sleep(Duration::from_millis(80)).await;
    }
    assert_eq!(client.rest().await, "");
    assert_eq!(stage.line().await["error"], "Nothing moved for too long.");
}
