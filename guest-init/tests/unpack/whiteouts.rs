//! OCI image specification, layer.md: each test names the clause it checks.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use protocol::FailureKind;

use crate::{
    tarball::{Item, dir, file, hard_link, symlink},
    unpacked::{refuse, unpack},
};

#[test]
fn creating_a_layer_entries_of_later_layers_are_added_and_change_what_is_there() {
    let image = unpack(&[
        &[dir("etc"), file("etc/a", "old"), file("etc/b", "b")],
        &[dir("etc").mode(0o700), file("etc/a", "new")],
    ]);
    assert_eq!(image.read("etc/a"), "new");
    assert_eq!(image.read("etc/b"), "b");
    assert_eq!(image.root().join("etc").symlink_metadata().unwrap().mode() & 0o777, 0o700);
}

#[test]
fn whiteouts_an_entry_with_the_prefix_hides_the_lower_one() {
    let image = unpack(&[&[dir("a"), file("a/x", ""), file("a/y", "")], &[file("a/.wh.x", "")]]);
    assert_eq!(image.paths(), ["a", "a/y"]);
}

#[test]
fn whiteouts_a_directory_is_hidden_with_all_it_holds() {
    let image = unpack(&[&[dir("a"), dir("a/b"), file("a/b/c", ""), file("k", "")], &[file(".wh.a", "")]]);
    assert_eq!(image.paths(), ["k"]);
}

#[test]
fn whiteouts_the_whiteout_itself_is_not_in_the_tree() {
    let image = unpack(&[&[file(".wh.nothing", ""), dir("d"), file("d/.wh..wh..opq", ""), file("d/x", "")]]);
    assert_eq!(image.paths(), ["d", "d/x"]);
}

#[test]
fn whiteouts_only_apply_to_lower_layers_whatever_their_order() {
    let lower = [dir("a"), file("a/x", "lower"), file("a/z", "lower")];
    for upper in [[file("a/.wh.x", ""), file("a/x", "upper")], [file("a/x", "upper"), file("a/.wh.x", "")]] {
        let image = unpack(&[&lower, &upper]);
        assert_eq!(image.read("a/x"), "upper");
        assert_eq!(image.read("a/z"), "lower");
    }
}

#[test]
fn whiteouts_a_directory_made_again_in_the_same_layer_has_only_the_new_content() {
    let lower = [dir("a"), file("a/old", ""), dir("a/sub"), file("a/sub/old", "")];
    for upper in
        [[file(".wh.a", ""), dir("a"), file("a/new", "")], [dir("a"), file("a/new", ""), file(".wh.a", "")]]
    {
        assert_eq!(unpack(&[&lower, &upper]).paths(), ["a", "a/new"]);
    }
}

#[test]
fn opaque_whiteouts_hide_all_lower_siblings_whatever_their_order() {
    let lower = [dir("a"), file("a/old", ""), dir("a/sub"), file("a/sub/old", ""), file("b", "")];
    let opaque = || file("a/.wh..wh..opq", "");
    for upper in [
        [dir("a"), opaque(), file("a/new", ""), file("a/sub/new", "")],
        [dir("a"), file("a/new", ""), file("a/sub/new", ""), opaque()],
        [opaque(), dir("a"), file("a/sub/new", ""), file("a/new", "")],
    ] {
        assert_eq!(unpack(&[&lower, &upper]).paths(), ["a", "a/new", "a/sub", "a/sub/new", "b"]);
    }
}

#[test]
fn opaque_whiteouts_leave_the_directory_itself() {
    let image = unpack(&[&[dir("a"), file("a/x", "")], &[file("a/.wh..wh..opq", "")]]);
    assert_eq!(image.paths(), ["a"]);
}

#[test]
fn opaque_whiteouts_of_the_root_hide_everything_below() {
    let image =
        unpack(&[&[dir("a"), file("a/x", ""), file("y", "")], &[file(".wh..wh..opq", ""), file("z", "")]]);
    assert_eq!(image.paths(), ["z"]);
}

#[test]
fn opaque_whiteouts_do_not_spare_a_file_for_a_link_of_the_same_layer() {
    let image = unpack(&[
        &[dir("a"), file("a/x", "data")],
        &[hard_link("linked", "a/x"), file("a/.wh..wh..opq", "")],
    ]);
    assert_eq!(image.paths(), ["a", "linked"]);
    assert_eq!(image.read("linked"), "data");
}

#[test]
fn a_whiteout_of_what_is_not_there_is_nothing() {
    let image = unpack(&[
        &[file("x", "")],
        &[file("no/where/.wh.y", ""), file(".wh.z", ""), file("q/.wh..wh..opq", "")],
    ]);
    assert_eq!(image.paths(), ["x"]);
}

#[test]
fn a_whiteout_of_a_link_hides_the_link_and_not_its_target() {
    let image = unpack(&[&[dir("t"), file("t/x", ""), symlink("l", "t")], &[file(".wh.l", "")]]);
    assert_eq!(image.paths(), ["t", "t/x"]);
}

#[test]
fn a_whiteout_that_names_no_file_is_refused() {
    for path in ["a/.wh.", "a/.wh..", "a/.wh...", ".wh..."] {
        assert_eq!(refuse(&[dir("a"), file(path, "")]).kind, FailureKind::BadLayer, "{path}");
    }
}

#[test]
fn names_that_aufs_kept_for_itself_are_left_out() {
    let image = unpack(&[&[
        dir(".wh..wh.plnk"),
        file(".wh..wh.plnk/1.2", ""),
        file(".wh..wh.aufs", ""),
        file("x", ""),
    ]]);
    assert_eq!(image.paths(), ["x"]);
}

#[test]
fn file_types_an_entry_of_another_type_replaces_the_lower_one() {
    let lower = [dir("a"), file("a/x", ""), file("b", "old"), symlink("c", "a"), symlink("d", "b")];
    let upper = [
        file("a", "file now"),
        dir("b"),
        file("b/x", ""),
        dir("c"),
        file("c/y", ""),
        file("d", "own content"),
    ];
    let image = unpack(&[&lower, &upper]);
    assert_eq!(image.paths(), ["a", "b", "b/x", "c", "c/y", "d"]);
    assert_eq!(image.read("a"), "file now");
    assert_eq!(image.read("d"), "own content");
}

#[test]
fn duplicate_entries_the_last_one_wins() {
    let image = unpack(&[&[
        file("a", "first"),
        file("a", "second"),
        dir("d"),
        file("d/x", ""),
        file("d", "file"),
        symlink("s", "a"),
        file("s", "no longer a link"),
    ]]);
    assert_eq!(image.paths(), ["a", "d", "s"]);
    assert_eq!(image.read("a"), "second");
    assert_eq!(image.read("s"), "no longer a link");
}

#[test]
fn hard_links_share_the_file_across_layers_and_their_replacement_does_not() {
    let image =
        unpack(&[&[file("a", "one"), hard_link("b", "a")], &[hard_link("c", "/a"), file("b", "two")]]);
    let inode = |path: &str| image.root().join(path).metadata().unwrap().ino();
    assert_eq!(inode("a"), inode("c"));
    assert_eq!(image.read("a"), "one");
    assert_eq!(image.read("b"), "two");
}

#[test]
fn hard_links_to_themselves_or_twice_change_nothing() {
    let image = unpack(&[&[file("a", "one"), hard_link("a", "a"), hard_link("b", "a"), hard_link("b", "a")]]);
    assert_eq!(image.read("a"), "one");
    assert_eq!(image.read("b"), "one");
}

#[test]
fn hard_links_to_a_symlink_are_links_to_the_link() {
    let image = unpack(&[&[symlink("s", "nowhere"), hard_link("t", "s")]]);
    assert!(image.root().join("t").symlink_metadata().unwrap().is_symlink());
}

#[test]
fn missing_directories_are_made_as_roots_with_mode_755() {
    let image = unpack(&[&[file("a/b/c", "x")]]);
    let metadata = image.root().join("a/b").metadata().unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o755, 0, 0));
}

#[test]
fn lower_links_to_directories_are_followed_within_the_root() {
    let image = unpack(&[
        &[
            dir("usr"),
            dir("usr/lib"),
            symlink("lib", "usr/lib"),
            symlink("abs", "/usr/lib"),
            symlink("up", "../../usr"),
        ],
        &[file("lib/x", ""), file("abs/y", ""), file("up/z", "")],
    ]);
    assert_eq!(image.paths(), ["abs", "lib", "up", "usr", "usr/lib", "usr/lib/x", "usr/lib/y", "usr/z"]);
}

#[test]
fn a_link_to_a_directory_that_is_missing_makes_it() {
    let image = unpack(&[&[
        symlink("var/run", "/run2"),
        symlink("l", "../../deep/er"),
        file("var/run/x", ""),
        file("l/y", ""),
    ]]);
    assert_eq!(image.paths(), ["deep", "deep/er", "deep/er/y", "l", "run2", "run2/x", "var/run"]);
}

#[test]
fn device_nodes_fifos_and_special_bits_come_as_they_are() {
    let image = unpack(&[&[
        Item { device: (1, 3), ..Item::new(b'3', "null") }.mode(0o666),
        Item { device: (8, 1), ..Item::new(b'4', "disk") },
        Item::new(b'6', "fifo").mode(0o600),
        Item { owner: (1000, 50), ..file("suid", "x").mode(0o6755) },
        dir("sticky").mode(0o1777),
    ]]);
    let metadata = |path: &str| image.root().join(path).symlink_metadata().unwrap();
    assert!(metadata("null").file_type().is_char_device());
    assert_eq!(metadata("null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(metadata("null").mode() & 0o7777, 0o666);
    assert!(metadata("disk").file_type().is_block_device());
    assert!(metadata("fifo").file_type().is_fifo());
    assert_eq!(metadata("suid").mode() & 0o7777, 0o6755);
    assert_eq!((metadata("suid").uid(), metadata("suid").gid()), (1000, 50));
    assert_eq!(metadata("sticky").mode() & 0o7777, 0o1777);
}

#[test]
fn times_of_directories_survive_what_is_made_in_them() {
    let image = unpack(&[
        &[dir("d"), file("d/x", ""), dir("d/e").pax("mtime", "12.5")],
        &[file("d/e/late", ""), file("d/later", "")],
    ]);
    let metadata = |path: &str| image.root().join(path).metadata().unwrap();
    assert_eq!(metadata("d").mtime(), 1_000_000_000);
    assert_eq!((metadata("d/e").mtime(), metadata("d/e").mtime_nsec()), (12, 500_000_000));
}

#[test]
fn the_root_has_the_metadata_that_a_layer_gives_it_and_else_mode_755() {
    let root_of = |items: &[Item]| unpack(&[items]).root().metadata().unwrap().mode() & 0o7777;
    assert_eq!(root_of(&[file("x", "")]), 0o755);
    assert_eq!(root_of(&[dir("./").mode(0o700), file("x", "")]), 0o700);
}

#[test]
fn what_guest_init_mounts_on_is_there() {
    let image = unpack(&[&[file("x", "")]]);
    for path in ["proc", "sys", "dev", "run/flyrun", "tmp", "etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        assert!(image.root().join(path).exists(), "{path}");
    }
    assert_eq!(image.root().join("tmp").metadata().unwrap().mode() & 0o7777, 0o1777);
}

#[test]
fn what_an_image_has_in_the_place_of_a_mount_point_stays() {
    let image =
        unpack(&[&[file("etc/hosts", "own"), symlink("run", "/var/run"), symlink("etc/resolv.conf", "/x")]]);
    assert_eq!(image.read("etc/hosts"), "own");
    assert!(image.root().join("run").symlink_metadata().unwrap().is_symlink());
    assert!(!image.root().join("x").exists());
}

#[test]
fn attributes_of_a_directory_are_those_of_its_last_entry() {
    let image = unpack(&[
        &[dir("d").pax("SCHILY.xattr.user.old", "1").pax("SCHILY.xattr.user.kept", "1")],
        &[dir("d").pax("SCHILY.xattr.user.kept", "2")],
    ]);
    let node = crate::snapshot::take(&image.root()).remove("d").unwrap();
    assert_eq!(node.xattrs, [("user.kept".to_owned(), b"2".to_vec())]);
}

#[test]
fn attributes_of_overlayfs_itself_are_left_out() {
    let image = unpack(&[&[dir("d").pax("SCHILY.xattr.trusted.overlay.opaque", "y")]]);
    assert_eq!(crate::snapshot::take(&image.root())["d"].xattrs, []);
}
