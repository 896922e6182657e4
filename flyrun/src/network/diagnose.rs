//! What this host lacks for machines' networks, for `flyrun doctor`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::firewall;

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub name: &'static str,
    pub message: String,
    /// What to do, where something is to be done.
    pub remedy: Option<String>,
}

/// Looks at everything. Nothing of it keeps a machine with `--network none` from running.
pub fn diagnose() -> Vec<Finding> {
    vec![network(), vhost(), forward(listing().as_ref())]
}

fn network() -> Finding {
    let lacks = |message: &str, remedy: &str| Finding {
        name: "network",
        message: message.to_string(),
        remedy: Some(remedy.to_string()),
    };
    if !Path::new("/dev/net/tun").exists() {
        return lacks("there is no /dev/net/tun", "Load the module: `modprobe tun`.");
    }
    if !firewall::is_installed() {
        return lacks("nft is not installed", "Install the package nftables.");
    }
    if !rustix::process::geteuid().is_root() {
        let told = "without root machines have no network (CAP_NET_ADMIN)";
        return lacks(told, "Run flyrun as root, or machines with `--network none`.");
    }
    Finding { name: "network", message: "TAP interfaces and nftables are there".into(), remedy: None }
}

fn vhost() -> Finding {
    let is_there = Path::new("/dev/vhost-net").exists();
    let message =
        if is_there { "the host's kernel moves packets" } else { "flyrun-vmm moves packets itself" };
    let remedy = (!is_there).then(|| "Load the module for more speed: `modprobe vhost_net`.".to_string());
    Finding { name: "vhost", message: message.into(), remedy }
}

/// A packet goes only where all tables let it, so that another's policy is the machines' too.
fn forward(listing: Option<&Value>) -> Finding {
    let name = "forward";
    match listing.and_then(dropping_chain) {
        None => Finding { name, message: "no other firewall drops what machines send".into(), remedy: None },
        Some((family, table, chain)) => {
            let target = if has_chain(listing, &table, "DOCKER-USER") { "DOCKER-USER" } else { &chain };
            let rule = |way| format!("nft insert rule {family} {table} {target} {way} '\"fly*\"' accept");
            Finding {
                name,
                message: format!(
                    "the chain {family} {table} {chain} drops what it does not know, machines' packets too"
                ),
                remedy: Some(format!("Let them pass: `{}; {}`.", rule("iifname"), rule("oifname"))),
            }
        }
    }
}

fn listing() -> Option<Value> {
    let listed = |program| Command::new(program).args(["-j", "list", "chains"]).output().ok();
    let output = firewall::PROGRAMS.into_iter().find_map(listed)?;
    serde_json::from_slice(&output.stdout).ok()
}

fn chains(listing: &Value) -> impl Iterator<Item = &Value> {
    let objects = listing.get("nftables").and_then(Value::as_array).into_iter().flatten();
    objects.filter_map(|object| object.get("chain"))
}

fn dropping_chain(listing: &Value) -> Option<(String, String, String)> {
    let text = |chain: &Value, key: &str| Some(chain.get(key)?.as_str()?.to_string());
    let drops = |chain: &&Value| {
        text(chain, "hook").is_some_and(|hook| hook == "forward")
            && text(chain, "policy").is_some_and(|policy| policy == "drop")
    };
    chains(listing)
        .filter(drops)
        .find_map(|chain| Some((text(chain, "family")?, text(chain, "table")?, text(chain, "name")?)))
}

fn has_chain(listing: Option<&Value>, table: &str, name: &str) -> bool {
    let is = |chain: &Value, key: &str, value: &str| chain.get(key).and_then(Value::as_str) == Some(value);
    listing.is_some_and(|listing| {
        chains(listing).any(|chain| is(chain, "table", table) && is(chain, "name", name))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chain(table: &str, name: &str, policy: &str) -> Value {
        json!({"chain": {"family": "ip", "table": table, "name": name, "hook": "forward", "policy": policy}})
    }

    #[test]
    fn dockers_policy_is_found_and_its_own_chain_for_exceptions_named() {
        let user = json!({"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER"}});
        let docker = json!({"nftables": [{"metainfo": {}}, chain("filter", "FORWARD", "drop"), user]});
        let finding = forward(Some(&docker));
        assert!(finding.message.contains("ip filter FORWARD"), "{}", finding.message);
        let remedy = finding.remedy.unwrap();
        assert!(remedy.contains("insert rule ip filter DOCKER-USER iifname"), "{remedy}");
    }

    #[test]
    fn chains_that_accept_are_no_trouble() {
        let fine =
            json!({"nftables": [chain("filter", "FORWARD", "accept"), chain("flyrun", "forward", "accept")]});
        assert_eq!(forward(Some(&fine)).remedy, None);
        assert_eq!(forward(None).remedy, None);
    }
}
