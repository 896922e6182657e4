//! TCP connections, with or without TLS, in halves.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use rustix::net::Shutdown;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// A TCP connection that several hold: one task reads and writes it, others may shut it down.
#[derive(Clone, Debug)]
pub(crate) struct Socket(Arc<TcpStream>);

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        // Whole messages are written at once, so that nothing is gained by waiting for more.
        let _ = stream.set_nodelay(true);
        Socket(Arc::new(stream))
    }

    /// This host's end.
    pub fn local_addr(&self) -> io::Result<std::net::SocketAddr> {
        self.0.local_addr()
    }

    /// Whoever reads or writes it sees its end now.
    pub fn cut(&self) {
        let _ = rustix::net::shutdown(&*self.0, Shutdown::Both);
    }

    /// Whoever is at the other end sees a reset once nobody holds this any more: what came was not all.
    pub fn reset_at_end(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(&*self.0, Some(std::time::Duration::ZERO));
    }

    /// A guess without a system call: nothing has arrived, no end either.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0];
        matches!(self.0.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    fn poll_read_buf(&self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        let space = buffer.capacity() - buffer.len();
        loop {
            let mut count = 0;
            let read = self.0.try_io(Interest::READABLE, || {
                count = self.0.try_read_buf(buffer)?;
                // Less than there is space for was all that there is: to be told so again would cost a system call.
                if 0 < count && count < space { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match read {
                _ if count > 0 => return Poll::Ready(Ok(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_read_ready(cx))?;
                }
                done => return Poll::Ready(done.map(|()| count)),
            }
        }
    }

    fn poll_write_slices(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        loop {
            match self.0.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_write_ready(cx))?;
                }
                done => return Poll::Ready(done),
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.0.try_read(buffer.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_read_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(&*self.0, Shutdown::Write).map_err(io::Error::from))
    }
}

/// What is read.
#[derive(Debug)]
pub(crate) enum Read {
    Plain(Socket),
    Tls(ReadHalf<TlsStream<Socket>>),
}

/// What is written.
#[derive(Debug)]
pub(crate) enum Write {
    Plain(Socket),
    Tls(WriteHalf<TlsStream<Socket>>),
}

/// Both halves of a connection without TLS.
pub(crate) fn plain(socket: &Socket) -> (Read, Write) {
    (Read::Plain(socket.clone()), Write::Plain(socket.clone()))
}

/// Both halves of a connection with TLS.
pub(crate) fn tls(stream: TlsStream<Socket>) -> (Read, Write) {
    let (read, write) = tokio::io::split(stream);
    (Read::Tls(read), Write::Tls(write))
}

impl Read {
    /// Ready when it may be worth having space to read to.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Read::Plain(socket) => socket.0.poll_read_ready(cx),
            // What TLS holds is seen by reading alone.
            Read::Tls(_) => Poll::Ready(Ok(())),
        }
    }

    /// Appends what can be read to `buffer`'s spare capacity, of which there is some; 0 is the end.
    pub fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        match self {
            Read::Plain(socket) => socket.poll_read_buf(cx, buffer),
            Read::Tls(half) => tokio_util::io::poll_read_buf(Pin::new(half), cx, buffer),
        }
    }
}

impl Write {
    /// Writes some of it.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self {
            Write::Plain(socket) => socket.poll_write_slices(cx, slices),
            Write::Tls(half) => Pin::new(half).poll_write_vectored(cx, slices),
        }
    }

    /// What TLS holds back is sent.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Write::Plain(_) => Poll::Ready(Ok(())),
            Write::Tls(half) => Pin::new(half).poll_flush(cx),
        }
    }

    /// The other side sees the end.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Write::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Write::Tls(half) => Pin::new(half).poll_shutdown(cx),
        }
    }
}

/// A connection in one piece, with what was read ahead of whoever takes it.
#[derive(Debug)]
pub(crate) struct Whole {
    ahead: BytesMut,
    read: Read,
    write: Write,
}

impl Whole {
    pub fn new(ahead: BytesMut, read: Read, write: Write) -> Whole {
        Whole { ahead, read, write }
    }
}

impl AsyncRead for Whole {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead.split_to(count));
            return Poll::Ready(Ok(()));
        }
        match &mut self.read {
            Read::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Read::Tls(half) => Pin::new(half).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Whole {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write.poll_write(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write.poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self.write, Write::Plain(_))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write.poll_shutdown(cx)
    }
}

impl crate::registry::Held for Socket {
    type Inner = TcpStream;

    fn weak(&self) -> std::sync::Weak<TcpStream> {
        Arc::downgrade(&self.0)
    }

    fn strong(weak: &std::sync::Weak<TcpStream>) -> Option<Socket> {
        weak.upgrade().map(Socket)
    }
}
