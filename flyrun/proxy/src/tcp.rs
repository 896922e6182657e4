//! Raw connections: bytes between a client and a machine.

use std::future::{Future as _, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;

use crate::access::Record;
use crate::h1::{Framing, Reader, Writer};
use crate::held::Held;
use crate::machines::{Failure, Machines, Want};
use crate::proxy_protocol;
use crate::routes::Route;
use crate::shared::{Peer, Shared};
use crate::socket::{self, Read, Socket, Write};
use crate::watch::Watch;
use crate::wire::{Copy, Incoming as _, Outgoing as _};

/// So many machines are tried for one connection.
const MAX_MACHINES: usize = 3;

/// Serves a connection to its end.
pub(crate) async fn serve<M: Machines>(
    shared: &Shared<M>,
    peer: &Peer,
    route: &Arc<Route>,
    (client, server): (SocketAddr, SocketAddr),
    read: Read,
    write: Write,
) {
    let (time, start) = (SystemTime::now(), Instant::now());
    let id = crate::id::next(time, route.region.to_str().unwrap_or("local"));
    route.metrics.tcp_connects.fetch_add(1, Relaxed);
    let mut reader = Reader::new(read, BytesMut::new());
    reader.expect_raw();
    let mut writer = Writer::new(write);
    let (mut up, mut down) = (Copy::default(), Copy::default());
    let mut attempts = 0;
    let begun = machine(shared, route, &mut reader, &mut attempts).await;
    let waited = start.elapsed();
    let (instance, error) = match begun {
        Err(error) => (None, Some(error)),
        Ok((held, socket)) => {
            let (back_read, back_write) = socket::plain(&socket);
            let mut back_reader = Reader::new(back_read, BytesMut::new());
            back_reader.expect_raw();
            let mut back_writer = Writer::new(back_write);
            let first = back_writer.head(Framing::Raw);
            if let Some(version) = route.proxy_protocol() {
                first.extend_from_slice(&proxy_protocol::header(version, client, server));
            }
            writer.head(Framing::Raw);
            let limit = shared.options.tcp_idle_timeout;
            let ends = ((&mut reader, &mut writer), (&mut back_reader, &mut back_writer));
            let error = pump(ends, &mut up, &mut down, limit).await.err();
            (Some(held.lease.instance.clone()), error)
        }
    };
    route.metrics.tcp_disconnects.fetch_add(1, Relaxed);
    route.metrics.data_in.fetch_add(up.bytes, Relaxed);
    route.metrics.data_out.fetch_add(down.bytes, Relaxed);
    shared.log.access(&Record {
        time,
        id: id.to_str().unwrap_or_default(),
        app: Some(&route.name),
        client: peer.address,
        port: peer.port,
        protocol: "TCP",
        method: "",
        host: "",
        path: "",
        status: 0,
        received: up.bytes,
        sent: down.bytes,
        duration: start.elapsed(),
        waited,
        instance: instance.as_deref(),
        attempts,
        error: error.as_deref(),
    });
}

/// A machine that accepts a connection.
async fn machine<M: Machines>(
    shared: &Shared<M>,
    route: &Arc<Route>,
    reader: &mut Reader,
    attempts: &mut u32,
) -> Result<(Arc<Held>, Socket), String> {
    let mut want = Want { app: route.name.clone(), service: route.service, steer: None, not: Vec::new() };
    let mut last = None;
    loop {
        let mut lease = pin!(shared.machines.lease(want.clone()));
        let leased = poll_fn(|cx| {
            if let Poll::Ready(leased) = lease.as_mut().poll(cx) {
                return Poll::Ready(Some(leased));
            }
            // One that has said something and nothing more to say may well wait for an answer.
            let is_gone = reader.poll_gone(cx).is_ready() && reader.buffer().is_empty();
            if is_gone { Poll::Ready(None) } else { Poll::Pending }
        })
        .await;
        let lease = match leased {
            None => return Err("The client did not wait for a machine.".into()),
            Some(Err(refusal)) => return Err(last.unwrap_or_else(|| refusal.to_string())),
            Some(Ok(lease)) => lease,
        };
        let life = shared.lives.of(&lease);
        let held = Held::new(lease, life, &route.metrics);
        *attempts += 1;
        let address = SocketAddr::new(held.lease.address, route.internal_port);
        let limit = shared.options.connect_timeout;
        match crate::backend::connect(&held.life, address, limit, &route.metrics).await {
            Ok(socket) => return Ok((held, socket)),
            Err(error) => {
                let why = format!("The app does not accept connections: {error}.");
                if *attempts as usize >= MAX_MACHINES {
                    return Err(why);
                }
                last = Some(why);
                if !held.life.is_over() {
                    shared.machines.failed(&held.lease, Failure::Connect);
                    want.not.push(held.lease.instance.clone());
                }
            }
        }
    }
}

type End<'e> = (&'e mut Reader, &'e mut Writer);

/// Copies both ways until both have ended. One that has may still be sent to.
async fn pump(
    (client, machine): (End<'_>, End<'_>),
    up: &mut Copy,
    down: &mut Copy,
    limit: Duration,
) -> Result<(), String> {
    let mut watch = Watch::new(limit);
    // The header goes out even if the client says nothing: the machine may be the one that speaks first.
    let mut is_begun = false;
    poll_fn(|cx| {
        if !is_begun {
            is_begun = true;
            let _ = machine.1.poll_flush(cx);
        }
        let up_now = up.poll(cx, client.0, machine.1);
        let down_now = down.poll(cx, machine.0, client.1);
        for one in [up_now, down_now] {
            if let Poll::Ready(Err(side)) = one {
                return Poll::Ready(Err(format!("The connection broke: {side}.")));
            }
        }
        if up.is_done() && down.is_done() {
            return Poll::Ready(Ok(()));
        }
        if std::mem::take(&mut up.moved) | std::mem::take(&mut down.moved) {
            watch.set(limit);
        }
        watch.poll(cx).map(|()| Err("Nothing moved for too long.".into()))
    })
    .await
}
