//! `/metrics`, on a listener of its own: HTTP as far as Prometheus and curl speak it.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Bytes of a request's head.
const MAX_HEAD: usize = 8 << 10;
const MAX_HEADERS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients at a time.
const MAX_CLIENTS: usize = 32;

/// Gives the page to whoever asks.
pub async fn serve(listener: TcpListener, page: Arc<dyn Fn() -> String + Send + Sync>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(client) = clients.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let page = page.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(PATIENCE, answer(stream, &*page)).await;
            drop(client);
        });
    }
}

async fn answer(mut stream: TcpStream, page: &(dyn Fn() -> String + Send + Sync)) -> std::io::Result<()> {
    let mut head = Vec::new();
    let (status, body) = loop {
        let mut piece = [0; 1024];
        let count = stream.read(&mut piece).await?;
        head.extend(piece.get(..count).unwrap_or_default());
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&head) {
            Ok(httparse::Status::Complete(_)) => match (request.method, request.path) {
                (Some("GET" | "HEAD"), Some("/metrics")) => break ("200 OK", page()),
                (Some("GET" | "HEAD"), _) => break ("404 Not Found", "It is at /metrics.\n".to_string()),
                _ => break ("405 Method Not Allowed", "Ask with GET.\n".to_string()),
            },
            Ok(httparse::Status::Partial) if count > 0 && head.len() < MAX_HEAD => {}
            _ => break ("400 Bad Request", "This is no request.\n".to_string()),
        }
    };
    let is_head = head.starts_with(b"HEAD");
    let lines = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(lines.as_bytes()).await?;
    if !is_head {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_page_is_at_its_place_and_nothing_else_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Arc::new(|| "flyrun_up 1\n".to_string())));
        for (request, status, body) in [
            ("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "200", "flyrun_up 1\n"),
            ("HEAD /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "200", ""),
            ("GET / HTTP/1.1\r\n\r\n", "404", "It is at /metrics.\n"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405", "Ask with GET.\n"),
            ("\u{1}\r\n\r\n", "400", "This is no request.\n"),
        ] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            let (head, told) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            assert_eq!(told, body);
        }
    }
}
