//! What is no matter of a single app.

use std::time::Duration;

/// Limits for all apps together.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections of clients at a time; one more is closed at once.
    pub max_connections: usize,
    /// Of these, from one address.
    pub max_connections_per_client: Option<usize>,
    /// Bytes of a request's head; more is answered with 431.
    pub max_head_bytes: usize,
    /// A client that speaks TLS has so long for the handshake.
    pub tls_handshake_timeout: Duration,
    /// A machine has so long to accept a connection.
    pub connect_timeout: Duration,
    /// A raw connection on which nothing moves is closed after so long.
    pub tcp_idle_timeout: Duration,
    /// How often certificate files are looked at.
    pub certificate_interval: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_connections: 65_536,
            max_connections_per_client: None,
            max_head_bytes: 64 << 10,
            tls_handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            tcp_idle_timeout: Duration::from_secs(3600),
            certificate_interval: Duration::from_secs(5),
        }
    }
}
