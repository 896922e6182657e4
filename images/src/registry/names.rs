//! Names of hosts become addresses here, and those that a registry has named only addresses that it may send us to.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hickory_resolver::{
    TokioResolver,
    config::{GOOGLE, LookupIpStrategy, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
};
use reqwest::{
    Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use tokio::sync::OnceCell;

use super::reach::Reach;

/// A registry's host, and those that it has named. It judges the addresses that are connected to, so that a name which
/// changes its address between two looks gains nothing.
#[derive(Clone)]
pub(super) struct Names(Arc<Inner>);

struct Inner {
    registry: String,
    resolver: OnceCell<TokioResolver>,
    known: Mutex<Known>,
}

struct Known {
    /// How near the registry is. Behind an HTTP proxy that is not found out: then it is anywhere.
    registry: Reach,
    foreign: BTreeSet<String>,
}

/// An address that a registry may not send us to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{address} is {}", .reach.name())]
pub(super) struct TooNear {
    pub address: IpAddr,
    pub reach: Reach,
}

impl Names {
    pub(super) fn new(registry: &Url) -> Self {
        let reach = literal(registry).map_or(Reach::Public, Reach::of);
        let registry = registry.host_str().unwrap_or_default().to_owned();
        let known = Mutex::new(Known { registry: reach, foreign: BTreeSet::new() });
        Self(Arc::new(Inner { registry, resolver: OnceCell::new(), known }))
    }

    /// Looks at the host that the registry sends us to: an address at once, a name's when it is connected to.
    pub(super) fn admit(&self, next: &Url) -> Result<(), TooNear> {
        let host = next.host_str().unwrap_or_default();
        if host == self.0.registry {
            return Ok(());
        }
        let mut known = self.0.known();
        match literal(next) {
            Some(address) => known.judge(address),
            None => {
                known.foreign.insert(host.to_owned());
                Ok(())
            }
        }
    }
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What may be connected to of what a name stands for.
    fn choose(&self, name: &str, addresses: Vec<IpAddr>) -> Result<Vec<IpAddr>, TooNear> {
        let mut known = self.known();
        if name == self.registry {
            // The nearest of them, as any of them may be the one that answers.
            known.registry = addresses.iter().copied().map(Reach::of).max().unwrap_or(Reach::Public);
        }
        if !known.foreign.contains(name) {
            return Ok(addresses);
        }
        let judged = addresses.iter().try_for_each(|address| known.judge(*address));
        judged.map(|()| addresses)
    }
}

impl Known {
    fn judge(&self, address: IpAddr) -> Result<(), TooNear> {
        let reach = Reach::of(address);
        if self.registry.may_send_to(reach) { Ok(()) } else { Err(TooNear { address, reach }) }
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let resolver = inner.resolver.get_or_try_init(async || new_resolver()).await?;
            let found = resolver.lookup_ip(name.as_str()).await?;
            let chosen = inner.choose(name.as_str(), found.iter().collect())?;
            let addresses: Addrs = Box::new(chosen.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

/// The address that stands in an address of the web in place of a name. Odd spellings are dotted ones already.
fn literal(url: &Url) -> Option<IpAddr> {
    url.host_str()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// As reqwest's own: by /etc/resolv.conf and /etc/hosts, IPv6 and IPv4.
fn new_resolver() -> Result<TokioResolver, NetError> {
    let mut builder = TokioResolver::builder_tokio().unwrap_or_else(|_| {
        TokioResolver::builder_with_config(
            ResolverConfig::udp_and_tcp(&GOOGLE),
            TokioRuntimeProvider::default(),
        )
    });
    builder.options_mut().ip_strategy = LookupIpStrategy::Ipv6AndIpv4;
    builder.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_in_a_redirect_are_judged_however_they_are_spelled() {
        let names = Names::new(&url("https://registry.example/"));
        for near in [
            "127.0.0.1:6379",
            "2130706433",
            "0x7f.1",
            "[::1]",
            "169.254.169.254",
            "[::ffff:a9fe:a9fe]",
            "10.0.0.1",
            "0",
        ] {
            assert!(names.admit(&url(&format!("https://{near}/"))).is_err(), "{near}");
        }
        names.admit(&url("https://1.1.1.1/")).unwrap();
    }

    #[test]
    fn a_registry_may_send_us_to_another_port_of_its_own_host() {
        Names::new(&url("http://127.0.0.1:5000/")).admit(&url("http://127.0.0.1:9000/")).unwrap();
        Names::new(&url("http://169.254.1.1/")).admit(&url("http://169.254.1.1:9000/")).unwrap();
    }

    #[test]
    fn a_name_is_judged_by_all_that_it_stands_for() {
        let names = Names::new(&url("https://registry.example/"));
        let (inner, at) = (&names.0, addresses(&["1.1.1.1", "127.0.0.1"]));
        // Nobody's word but the user's, or a proxy's of the user.
        assert_eq!(inner.choose("proxy.lan", at.clone()).unwrap(), at);
        names.admit(&url("https://storage.example/")).unwrap();
        assert!(inner.choose("storage.example", at).is_err());
        assert!(inner.choose("storage.example", addresses(&["1.1.1.1"])).is_ok());
        // In a network of one's own, storage is there too.
        inner.choose("registry.example", addresses(&["10.1.1.1"])).unwrap();
        assert!(inner.choose("storage.example", addresses(&["10.1.1.2"])).is_ok());
        assert!(inner.choose("storage.example", addresses(&["127.0.0.1"])).is_err());
    }
}
