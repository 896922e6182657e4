//! The bounds of an image as a whole.

use guest_init::{failure::Failure, unpack::layer::Limits};
use protocol::{Compression, FailureKind};
use sha2::{Digest, Sha256};

use crate::{
    tarball::{dir, file, hard_link, tar},
    unpacked::Unpacked,
};

fn unpack_within(tars: &[Vec<u8>], bytes: u64, entries: u64) -> Result<(), Failure> {
    let layers: Vec<_> =
        tars.iter().map(|tar| (tar.clone(), Compression::None, Sha256::digest(tar).into())).collect();
    Unpacked::empty().unpack_raw(&layers, Limits { bytes, entries })
}

#[test]
fn bytes_count_over_all_layers() {
    let tars = [tar(&[file("a", [1; 600])]), tar(&[file("b", [1; 400])])];
    assert_eq!(unpack_within(&tars, 1000, 10), Ok(()));
    let failure = unpack_within(&tars, 999, 10).unwrap_err();
    assert_eq!(failure.kind, FailureKind::LimitExceeded);
    assert!(failure.message.starts_with("layer 1: entry \"b\""), "{failure}");
}

#[test]
fn entries_count_over_all_layers_and_whether_they_replace_others_or_not() {
    let tars = [tar(&[dir("a"), file("a/.wh.x", "")]), tar(&[dir("a"), dir("a"), hard_link("b", "c")])];
    assert_eq!(unpack_within(&tars, 1000, 4).unwrap_err().kind, FailureKind::LimitExceeded);
}

#[test]
fn a_stream_that_goes_on_behind_its_archive_is_bounded() {
    let mut bomb = tar(&[file("a", "x")]);
    bomb.resize(20 << 20, 0);
    let failure = unpack_within(&[bomb], 1000, 10).unwrap_err();
    assert_eq!(failure.kind, FailureKind::LimitExceeded);
}

#[test]
fn holes_are_free_but_no_larger_than_a_file_can_be() {
    let sparse = file("x", [1; 10]).pax("GNU.sparse.map", "0,10").pax("GNU.sparse.size", "1000000000");
    assert_eq!(unpack_within(&[tar(&[sparse])], 100, 10), Ok(()));
}
