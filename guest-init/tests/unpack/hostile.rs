//! Archives that were made to do harm. Each test ends with a look at the directory beside the root.

use protocol::{Compression, FailureKind};
use sha2::{Digest, Sha256};

use crate::{
    tarball::{Item, dir, file, hard_link, header, seal, symlink, tar},
    unpacked::{LIMITS, Unpacked, refuse, unpack},
};

#[test]
fn paths_that_leave_the_root_are_refused_by_name() {
    for path in ["../outside/x", "a/../../outside/x", "/../outside/x", "..", "a/b/../../../outside"] {
        for item in
            [file(path, "x"), dir(path), symlink(path, "x"), hard_link(path, "a"), Item::new(b'6', path)]
        {
            let failure = refuse(&[item]);
            assert_eq!(failure.kind, FailureKind::BadLayer);
            assert!(failure.message.contains("leads out of the root"), "{failure}");
            assert!(failure.message.starts_with("layer 0: entry \""), "{failure}");
        }
    }
}

#[test]
fn absolute_paths_are_below_the_root() {
    let image = unpack(&[&[file("/etc/passwd2", "mine")]]);
    assert_eq!(image.read("etc/passwd2"), "mine");
}

#[test]
fn links_out_of_the_root_are_followed_within_it() {
    let image = Unpacked::empty();
    let outside = image.outside();
    let outside = outside.to_str().unwrap();
    let tar = tar(&[
        symlink("up", "../outside"),
        symlink("absolute", outside),
        symlink("root", "/"),
        symlink("chain", "up"),
        file("up/secret", "overwritten"),
        file("absolute/secret", "overwritten"),
        file("chain/new", "x"),
        file("root/outside/new2", "x"),
        dir("up/deeper"),
        hard_link("stolen", "up/secret"),
        file("up/.wh.nothing", ""),
    ]);
    image.unpack_tars(&[tar]).unwrap();
    image.assert_outside_untouched();
    assert_eq!(image.read("outside/secret"), "overwritten");
    assert_eq!(image.read("stolen"), "overwritten");
}

#[test]
fn whiteouts_through_links_hide_nothing_outside() {
    let image = Unpacked::empty();
    let outside = image.outside();
    let outside = outside.to_str().unwrap();
    let lower = tar(&[symlink("up", "../outside"), symlink("absolute", outside)]);
    let upper = tar(&[
        file("up/.wh.secret", ""),
        file("absolute/.wh.secret", ""),
        file("up/.wh..wh..opq", ""),
        file("absolute/.wh..wh..opq", ""),
    ]);
    image.unpack_tars(&[lower, upper]).unwrap();
    image.assert_outside_untouched();
}

#[test]
fn an_existing_link_in_the_place_of_an_entry_is_replaced_and_not_followed() {
    let image = Unpacked::empty();
    let secret = image.outside().join("secret");
    let secret = secret.to_str().unwrap();
    let targets =
        [symlink("f", secret), symlink("d", "../outside"), symlink("l", secret), symlink("h", secret)];
    let upper = [
        file("f", "x"),
        dir("d"),
        file("d/secret", "x"),
        symlink("l", "y"),
        file("a", "x"),
        hard_link("h", "a"),
    ];
    image.unpack_tars(&[tar(&targets), tar(&upper)]).unwrap();
    image.assert_outside_untouched();
    assert_eq!(image.read("d/secret"), "x");
}

#[test]
fn hard_links_out_of_the_root_are_refused() {
    for target in ["../outside/secret", "/../outside/secret", "", "/", "missing", "a/missing"] {
        let failure = refuse(&[hard_link("x", target)]);
        assert_eq!(failure.kind, FailureKind::BadLayer, "{target}");
    }
    let image = Unpacked::empty();
    let secret = image.outside().join("secret");
    let failure = image.unpack_tars(&[tar(&[hard_link("x", secret.to_str().unwrap())])]).unwrap_err();
    assert_eq!(failure.kind, FailureKind::BadLayer);
    image.assert_outside_untouched();
}

#[test]
fn magic_links_of_proc_are_not_followed() {
    // Without a /proc in the root there is nothing to follow; the target is resolved within the root.
    let image = unpack(&[&[symlink("p", "/proc/self/root"), file("p/x", "inside")]]);
    assert_eq!(image.read("proc/self/root/x"), "inside");
}

#[test]
fn loops_of_links_end() {
    for items in [
        vec![symlink("a", "b"), symlink("b", "a"), file("a/x", "")],
        vec![symlink("a", "a/b"), file("a/x", "")],
        vec![symlink("a", "missing/../a"), file("a/x", "")],
    ] {
        assert_eq!(refuse(&items).kind, FailureKind::BadLayer);
    }
}

#[test]
fn a_file_is_no_directory() {
    let failure = refuse(&[file("a", ""), file("a/b", "")]);
    assert_eq!(failure.kind, FailureKind::BadLayer);
    assert!(failure.message.contains("\"a/b\"") && failure.message.contains("not a directory"), "{failure}");
}

#[test]
fn the_root_can_not_be_replaced() {
    for item in [file("./", ""), symlink("/", "x"), hard_link(".", "a")] {
        assert_eq!(refuse(&[item]).kind, FailureKind::BadLayer);
    }
}

#[test]
fn deeply_nested_directories_are_made_and_removed() {
    let deep = "d/".repeat(1000);
    let image = unpack(&[&[dir(&deep), file(format!("{deep}x"), "")], &[file(".wh.d", "")]]);
    assert!(image.paths().is_empty());
}

#[test]
fn names_that_linux_does_not_allow_are_told_so() {
    for path in ["n".repeat(256), "d/".repeat(3000)] {
        let failure = refuse(&[file("x", "").pax("path", path)]);
        assert!(failure.message.contains("which Linux does not allow"), "{failure}");
    }
}

#[test]
fn an_archive_is_refused_wherever_it_is_cut() {
    let whole = tar(&[dir("a"), file("a/b", vec![1; 3000]).pax("mtime", "1.5"), symlink("c", "d")]);
    let content_ends = whole.len() - 1024;
    for length in (1..content_ends).step_by(97).filter(|length| !is_between_entries(*length)) {
        let image = Unpacked::empty();
        let failure = image.unpack_tars(&[whole[..length].to_vec()]).unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadLayer, "cut at {length}: {failure}");
    }
}

/// After the directory: a stream may end there, for want of a rule that forbids it.
fn is_between_entries(length: usize) -> bool {
    length == 512
}

#[test]
fn a_flipped_bit_is_found_by_the_digest() {
    let whole = tar(&[dir("a"), file("a/b", vec![1; 3000]), symlink("c", "d")]);
    let diff_id: [u8; 32] = Sha256::digest(&whole).into();
    for at in (0..whole.len()).step_by(61) {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        let image = Unpacked::empty();
        let failure = image.unpack_raw(&[(flipped, Compression::None, diff_id)], LIMITS).unwrap_err();
        assert_eq!(failure.kind, FailureKind::BadLayer);
        assert!(failure.message.contains("has the digest"), "flipped at {at}: {failure}");
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for size in [[0xff; 12], [0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]] {
        let mut block = header(&file("x", ""), 0);
        block[124..136].copy_from_slice(&size);
        seal(&mut block);
        let image = Unpacked::empty();
        let failure = image.unpack_tars(&[[block.to_vec(), vec![0; 2048]].concat()]).unwrap_err();
        assert!(matches!(failure.kind, FailureKind::BadLayer | FailureKind::LimitExceeded), "{failure}");
    }
}

#[test]
fn an_extended_header_is_not_read_into_memory_without_bound() {
    let mut block = header(&Item::new(b'x', "pax"), 0);
    block[124..136].copy_from_slice(b"77777777777\0");
    seal(&mut block);
    let image = Unpacked::empty();
    let failure = image.unpack_tars(&[[block.to_vec(), vec![0; 4096]].concat()]).unwrap_err();
    assert!(failure.message.contains("are allowed"), "{failure}");
}

#[test]
fn owners_out_of_range_are_refused() {
    for key in ["uid", "gid"] {
        for value in ["4294967295", "4294967296", "99999999999999"] {
            let failure = refuse(&[file("x", "").pax(key, value)]);
            assert!(failure.message.contains("out of range"), "{failure}");
        }
    }
}

#[test]
fn an_unknown_type_is_named() {
    let failure = refuse(&[Item::new(b'M', "x")]);
    assert!(failure.message.contains("unknown type 'M'"), "{failure}");
}

#[test]
fn a_sparse_file_can_not_be_larger_than_its_map() {
    let sparse = |map: &str, size: &str, data: usize| {
        file("x", vec![1; data]).pax("GNU.sparse.map", map).pax("GNU.sparse.size", size)
    };
    for item in [
        sparse("0,100,50,100", "1000", 200),
        sparse("0,100,200", "1000", 100),
        sparse("900,200", "1000", 200),
        sparse("0,18446744073709551615,1,1", "1000", 100),
        sparse("0,10", "99999999999999999999", 10),
        sparse("0,10", "9223372036854775807", 10),
        sparse("0,10", "1000", 11),
    ] {
        let failure = refuse(&[item]);
        assert_eq!(failure.kind, FailureKind::BadLayer, "{failure}");
    }
}
