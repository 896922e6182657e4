//! What both network devices offer: features and configuration space (virtio 1.2, sections 5.1.3 and 5.1.4).

use super::Offload;

pub const DEVICE_TYPE: u32 = 1;
/// The most pairs of queues that a card has.
pub const MAX_PAIRS: u16 = 8;
/// All pairs and the control queue.
const QUEUE_SIZES: [u16; 2 * MAX_PAIRS as usize + 1] = [256; 2 * MAX_PAIRS as usize + 1];

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
pub const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
pub const F_CTRL_VQ: u64 = 1 << 17;
pub const F_MQ: u64 = 1 << 22;

/// What the TAP and the configuration space bring, whoever moves the packets.
const CARD_FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MTU
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_STATUS;

const STATUS_LINK_UP: u16 = 1;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// What the guest reads of its card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The card's address.
    pub mac: Mac,
    /// The largest packet without its Ethernet header, in bytes.
    pub mtu: u16,
    /// Pairs of queues, 1 to [`MAX_PAIRS`]. A card with one has no control queue.
    pub pairs: u16,
}

impl NetConfig {
    /// The features, but for what depends on who moves the packets.
    pub fn features(self) -> u64 {
        CARD_FEATURES | if self.pairs > 1 { F_CTRL_VQ | F_MQ } else { 0 }
    }

    /// The largest size of each queue.
    pub fn queue_max_sizes(self) -> &'static [u16] {
        let pairs = usize::from(self.pairs.clamp(1, MAX_PAIRS));
        let count = if pairs > 1 { 2 * pairs + 1 } else { 2 };
        QUEUE_SIZES.get(..count).unwrap_or(&QUEUE_SIZES)
    }

    /// struct virtio_net_config, up to and with mtu.
    fn bytes(self) -> [u8; 12] {
        let [a, b, c, d, e, f] = self.mac;
        let [status, status_high] = STATUS_LINK_UP.to_le_bytes();
        let [pairs, pairs_high] = self.pairs.to_le_bytes();
        let [mtu, mtu_high] = self.mtu.to_le_bytes();
        [a, b, c, d, e, f, status, status_high, pairs, pairs_high, mtu, mtu_high]
    }

    /// Reads the configuration space; bytes beyond its end read as zero.
    pub fn read(self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        for (place, byte) in data.iter_mut().zip(rest) {
            *place = *byte;
        }
    }
}

/// What the negotiated features let the host hand over unfinished. Section 5.1.3.1: none of it without checksums.
pub fn offload(features: u64) -> Offload {
    let checksum = features & F_GUEST_CSUM != 0;
    let has = |feature| checksum && features & feature != 0;
    let (tso4, tso6) = (has(F_GUEST_TSO4), has(F_GUEST_TSO6));
    Offload { checksum, tso4, tso6, ecn: has(F_GUEST_ECN) && (tso4 || tso6) }
}

/// How many pairs of queues there are for this driver.
pub fn negotiated_pairs(features: u64, config: NetConfig) -> u16 {
    if features & F_MQ != 0 { config.pairs } else { 1 }
}

/// Whether there is a control queue for this driver.
pub fn has_control(features: u64) -> bool {
    features & F_CTRL_VQ != 0
}

/// Whether a packet may lie in several chains.
pub fn merges(features: u64) -> bool {
    features & F_MRG_RXBUF != 0
}
