//! The attacks, by name.

mod chains;
mod frames;
mod registers;
mod requests;
mod sockets;
mod storms;

use crate::Scene;

/// Runs one; the number of things it did, or `None` if there is no such attack.
pub fn run(name: &str, scene: &mut Scene) -> Option<u64> {
    let attack: fn(&mut Scene) -> u64 = match name {
        "registers" => registers::storm,
        "resets" => registers::resets,
        "rings" => chains::rings,
        "chains" => chains::chains,
        "available" => chains::available,
        "race" => chains::race,
        "endless" => chains::endless,
        "blocks" => requests::blocks,
        "balloon" => requests::balloon,
        "frames" => frames::frames,
        "flood" => sockets::flood,
        "connections" => sockets::connections,
        "overrun" => sockets::overrun,
        "ports" => storms::ports,
        "exits" => storms::exits,
        "console" => storms::console,
        _ => return None,
    };
    Some(attack(scene))
}
