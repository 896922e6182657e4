//! The header before every packet (virtio 1.2, section 5.10.6).

/// Length of the header in bytes.
pub const HEADER_BYTES: u64 = 44;
/// The well-known address of the host (section 5.10.4.1).
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const TYPE_STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both ways.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// Ends one or both directions of one.
    Shutdown,
    /// Carries data.
    ReadWrite,
    /// Tells of buffer space; every other packet does so too.
    CreditUpdate,
    /// Asks to be told of buffer space.
    CreditRequest,
}

impl Op {
    fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::ReadWrite,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }

    fn number(self) -> u16 {
        match self {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::ReadWrite => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
        }
    }
}

/// struct virtio_vsock_hdr. What is unknown in a received one is kept as `None`: it must be answered, and with a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub source_cid: u64,
    /// Address of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of data behind the header.
    pub length: u32,
    /// Whether this is about a stream, the only kind there is here.
    pub stream: bool,
    /// What it is about.
    pub op: Option<Op>,
    /// The flags of a shutdown.
    pub flags: u32,
    /// Size of the sender's buffer for this connection in bytes.
    pub buffer_allocation: u32,
    /// Bytes that the sender has taken out of that buffer, modulo 2^32.
    pub forward_count: u32,
}

impl Header {
    /// Reads a header; any bytes are one.
    pub fn parse(bytes: &[u8; HEADER_BYTES as usize]) -> Self {
        let (stream, op) = (u16_at(bytes, 28) == TYPE_STREAM, Op::from_number(u16_at(bytes, 30)));
        Header {
            source_cid: u64_at(bytes, 0),
            destination_cid: u64_at(bytes, 8),
            source_port: u32_at(bytes, 16),
            destination_port: u32_at(bytes, 20),
            length: u32_at(bytes, 24),
            stream,
            op,
            flags: u32_at(bytes, 32),
            buffer_allocation: u32_at(bytes, 36),
            forward_count: u32_at(bytes, 40),
        }
    }

    /// The header as it lies in memory. An unknown op is 0, which is "invalid".
    pub fn to_bytes(self) -> [u8; HEADER_BYTES as usize] {
        let mut bytes = [0; HEADER_BYTES as usize];
        let fields: [(usize, &[u8]); 10] = [
            (0, &self.source_cid.to_le_bytes()),
            (8, &self.destination_cid.to_le_bytes()),
            (16, &self.source_port.to_le_bytes()),
            (20, &self.destination_port.to_le_bytes()),
            (24, &self.length.to_le_bytes()),
            (28, &u16::from(self.stream).to_le_bytes()),
            (30, &self.op.map_or(0, Op::number).to_le_bytes()),
            (32, &self.flags.to_le_bytes()),
            (36, &self.buffer_allocation.to_le_bytes()),
            (40, &self.forward_count.to_le_bytes()),
        ];
        for (at, field) in fields {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
        }
        bytes
    }

    /// The reset that answers this packet.
    pub fn reset(&self) -> Header {
        Header {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            stream: true,
            op: Some(Op::Reset),
            flags: 0,
            buffer_allocation: 0,
            forward_count: 0,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}
