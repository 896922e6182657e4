//! The boot configuration, what is delivered beside it and what processes say on the socket of the lease, and what guest-init makes of its strings and of an image's files.
#![no_main]
#![allow(clippy::expect_used)]

use guest_init::busy::{self, Asked};
use guest_init::run::{command, delivery, user};
use libfuzzer_sys::fuzz_target;
use protocol::{
    BootConfig, MAGIC, PROTOCOL_VERSION, decode_config, decode_delivery, encode_config, encode_delivery,
};

fuzz_target!(|data: &[u8]| {
    let _ = decode_config(data);
    if let Ok(Some(Asked::Hold { seconds })) = busy::read(data) {
        assert!((1..=protocol::MAX_BUSY_SECONDS).contains(&seconds));
    }
    let delivered = [&(data.len() as u32).to_le_bytes()[..], data].concat();
    if let Ok(delivery) = decode_delivery(&delivered) {
        let again = encode_delivery(&delivery).expect("what was decoded can be encoded");
        assert!(decode_delivery(&again).expect("it decodes") == delivery);
    }
    let file = [&MAGIC[..], &PROTOCOL_VERSION.to_le_bytes(), data].concat();
    let Ok(config) = decode_config(&file) else { return };
    let again = encode_config(&config).expect("what was decoded can be encoded");
    assert_eq!(decode_config(&again).expect("it decodes"), config);
    let BootConfig::Run(config) = config else { return };
    let passwd = config.hostname.as_bytes();
    let group = config.rootfs.as_bytes();
    if let Ok(user) = user::resolve(&config.user, passwd, group) {
        assert!(user.uid != u32::MAX && user.gid != u32::MAX);
        let given = delivery::environment(config.env.clone(), config.argv.clone());
        let last = config.argv.iter().rfind(|entry| entry.find('=').is_some_and(|at| at > 0));
        assert!(last.is_none_or(|entry| given.contains(entry)));
        let env = command::environment(&given, &config, &user);
        let path = command::variable(&env, "PATH").expect("there is always a PATH");
        for program in &config.argv {
            assert!(!command::candidates(program, path).is_empty());
        }
    }
});
