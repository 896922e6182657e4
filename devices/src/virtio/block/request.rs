//! One request of the guest, read from its chain and carried out (virtio 1.2, section 5.2.6).

use crate::virtio::{
    Memory,
    block::backend::{Backend, BackendFault, SECTOR_BYTES},
    ring::{Chain, RingError, total},
    transfer::{Span, Transfer},
};

/// The most buffers of data that a request may have: a queue's size less its header and its status.
pub const MAX_SEGMENTS: u32 = 254;
/// The most bytes in one buffer of data.
pub const MAX_SEGMENT_BYTES: u32 = 256 << 10;
/// The most bytes of data in one request, so that none occupies the device for long.
pub const MAX_DATA_BYTES: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64;
/// The most ranges in one DISCARD or WRITE_ZEROES.
pub const MAX_RANGES: u32 = 32;
/// The most sectors in one range of a DISCARD: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors in one range of a WRITE_ZEROES: 16 MiB, which may have to be written out.
pub const MAX_ZERO_SECTORS: u32 = 1 << 15;

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;
/// Length of the device's name in bytes (section 5.2.6, VIRTIO_BLK_T_GET_ID).
pub const ID_BYTES: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
const FLAG_UNMAP: u32 = 1;

/// How a request ended, other than well.
enum Failure {
    /// The driver has broken the ring.
    Ring(RingError),
    /// What the request wants is not possible on this disk.
    Refused,
    /// The request is not one that this device knows.
    Unsupported,
    /// The host failed.
    Host(BackendFault),
}

impl From<RingError> for Failure {
    fn from(error: RingError) -> Self {
        Failure::Ring(error)
    }
}

impl From<BackendFault> for Failure {
    fn from(fault: BackendFault) -> Self {
        Failure::Host(fault)
    }
}

/// What serving a request needs besides the request.
pub struct Server<'a> {
    /// The disk.
    pub backend: &'a Backend,
    /// The disk's name.
    pub id: &'a [u8; ID_BYTES],
    /// Guest memory.
    pub memory: &'a Memory,
    /// The means of I/O.
    pub transfer: &'a mut Transfer,
}

/// What a request that ended well did, in bytes.
#[derive(Default)]
struct Done {
    /// Written to the chain, without the status.
    written: u64,
    /// As in [`Served`].
    moved: u64,
}

/// What became of a request.
pub struct Served {
    /// Bytes written to the chain, with the status byte.
    pub written: u32,
    /// Bytes of the disk that were read, written or zeroed, as far as a rate limit is concerned.
    pub moved: u64,
    /// What the host did not do, if it did not.
    pub fault: Option<BackendFault>,
}

impl Server<'_> {
    /// Carries out the request in `chain` and writes its status.
    ///
    /// # Errors
    /// The chain has no room for a header or a status.
    pub fn serve(&mut self, chain: &Chain) -> Result<Served, RingError> {
        let writable = total(chain.writable());
        // Section 5.2.6: the status is the last writable byte, wherever the buffers begin and end (section 2.7.4.3).
        let Some(status_at) = writable.checked_sub(1) else { return Err(RingError::TooShort { needed: 1 }) };
        let mut fault = None;
        let (status, Done { written, moved }) = match self.carry_out(chain, status_at) {
            Ok(done) => (S_OK, done),
            Err(Failure::Refused) => (S_IOERR, Done::default()),
            Err(Failure::Unsupported) => (S_UNSUPP, Done::default()),
            Err(Failure::Host(host)) => {
                fault = Some(host);
                (S_IOERR, Done::default())
            }
            Err(Failure::Ring(error)) => return Err(error),
        };
        chain.write(self.memory, status_at, &[status])?;
        // Section 2.7.8.2: the length says how much, from the beginning on, the driver may rely on.
        let written = if written == status_at { written + 1 } else { written };
        Ok(Served { written: u32::try_from(written).unwrap_or(u32::MAX), moved, fault })
    }

    fn carry_out(&mut self, chain: &Chain, writable: u64) -> Result<Done, Failure> {
        let mut header = [0; HEADER_BYTES as usize];
        chain.read(self.memory, 0, &mut header)?;
        let kind = le_u32(&header, 0);
        let sector = le_u64(&header, 8);
        let readable = total(chain.readable()) - HEADER_BYTES;
        match kind {
            T_IN => {
                let offset = self.range(sector, writable)?;
                let span = Span { buffers: chain.writable(), offset: 0, length: writable };
                self.backend.read(self.transfer, self.memory, span, offset)?;
                Ok(Done { written: writable, moved: writable })
            }
            T_OUT => {
                self.writable_disk()?;
                let offset = self.range(sector, readable)?;
                let span = Span { buffers: chain.readable(), offset: HEADER_BYTES, length: readable };
                self.backend.write(self.transfer, self.memory, span, offset)?;
                Ok(Done { written: 0, moved: readable })
            }
            T_FLUSH => {
                self.backend.flush()?;
                Ok(Done::default())
            }
            T_GET_ID => {
                let length = self.id.len().min(usize::try_from(writable).unwrap_or(usize::MAX));
                chain.write(self.memory, 0, self.id.get(..length).unwrap_or_default())?;
                Ok(Done { written: length as u64, moved: 0 })
            }
            T_DISCARD | T_WRITE_ZEROES => {
                self.writable_disk()?;
                let moved = self.ranges(chain, readable, kind)?;
                Ok(Done { written: 0, moved })
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Section 5.2.6.2: writing a read-only device is VIRTIO_BLK_S_IOERR.
    fn writable_disk(&self) -> Result<(), Failure> {
        if self.backend.read_only() { Err(Failure::Refused) } else { Ok(()) }
    }

    /// Where on the disk the bytes are, if they are whole sectors and on it.
    fn range(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        if !length.is_multiple_of(SECTOR_BYTES) || length > MAX_DATA_BYTES {
            return Err(Failure::Refused);
        }
        self.on_disk(sector, length)
    }

    fn on_disk(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Refused)?;
        let end = offset.checked_add(length).ok_or(Failure::Refused)?;
        if end <= self.backend.size() { Ok(offset) } else { Err(Failure::Refused) }
    }

    /// DISCARD and WRITE_ZEROES: all ranges are checked before the first is carried out. Returns the bytes zeroed, which
    /// may have to be written out.
    fn ranges(&mut self, chain: &Chain, length: u64, kind: u32) -> Result<u64, Failure> {
        let count = length / RANGE_BYTES;
        if !length.is_multiple_of(RANGE_BYTES) || count > u64::from(MAX_RANGES) {
            return Err(Failure::Refused);
        }
        let (max_sectors, flags) =
            if kind == T_DISCARD { (MAX_DISCARD_SECTORS, 0) } else { (MAX_ZERO_SECTORS, FLAG_UNMAP) };
        let mut ranges = Vec::with_capacity(count as usize);
        for n in 0..count {
            let mut bytes = [0; RANGE_BYTES as usize];
            chain.read(self.memory, HEADER_BYTES + n * RANGE_BYTES, &mut bytes)?;
            let (sector, sectors, flag_bits) = (le_u64(&bytes, 0), le_u32(&bytes, 8), le_u32(&bytes, 12));
            // Section 5.2.6.2: reserved flags, and unmap on a discard, are VIRTIO_BLK_S_UNSUPP.
            if flag_bits & !flags != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Failure::Refused);
            }
            let length = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.on_disk(sector, length)?;
            if length > 0 {
                ranges.push((offset, length, flag_bits & FLAG_UNMAP != 0));
            }
        }
        let mut zeroed = 0;
        for (offset, length, unmap) in ranges {
            if kind == T_DISCARD {
                self.backend.discard(offset, length)?;
            } else {
                self.backend.write_zeroes(offset, length, unmap)?;
                zeroed += length;
            }
        }
        Ok(zeroed)
    }
}

fn le_u32(bytes: &[u8; 16], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

fn le_u64(bytes: &[u8; 16], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}
