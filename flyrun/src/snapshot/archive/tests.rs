//! Archives, there and back, and those that nobody should take.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use images::{Digest, PruneOptions, Store};
use tar::{Builder, EntryType, Header};
use vmm::snapshot::header::MemorySummary;
use vmm::snapshot::identity::{DiskId, FileId};
use vmm::snapshot::sections::State;
use vmm::snapshot::{MEMORY, STATE, format, save};

use super::{MANIFEST, export, import};
use crate::machine::{self, DISK};
use crate::network::Mode;
use crate::snapshot::{Record, Snapshots};

const MIB: u32 = 128;

/// A host with one snapshot, "warm", of a machine with a disk.
struct Host {
    root: PathBuf,
    snapshots: Snapshots,
    store: Store,
    _scratch: tempfile::TempDir,
}

fn time(path: &Path, ns: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::from_nanos(ns)).unwrap();
}

fn sparse(path: &Path, bytes: u64, data: &[(u64, &[u8])]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    data.iter().for_each(|(at, data)| file.write_all_at(data, *at).unwrap());
}

fn id(path: &Path) -> DiskId {
    DiskId { files: vec![FileId::of(path).unwrap()] }
}

impl Host {
    fn empty() -> Host {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("root");
        let (snapshots, store) = (Snapshots::new(root.join("snapshots")), Store::open(&root));
        fs::create_dir(&root).unwrap();
        Host { root, snapshots, store, _scratch: scratch }
    }

    /// `change` may make another machine of it.
    fn with(change: impl FnOnce(&mut machine::Record)) -> Host {
        let host = Host::empty();
        let rootfs = host.root.join("rootfs.new");
        sparse(&rootfs, images::ROOTFS_BYTES, &[(1 << 20, b"rootfs"), (40 << 30, b"far away")]);
        time(&rootfs, 1_600_000_000_123_456_789);
        let chain_id = Digest::of(b"chain");
        host.store.adopt_rootfs(&chain_id, &rootfs).unwrap();
        let mut machine = machine::Record::example("web");
        machine.chain_id = chain_id.to_string();
        machine.config.disk = Some(crate::size::Size::gib(10));
        machine.config.network.mode = Mode::None;
        machine.config.run.hostname.clone_from(&machine.id);
        change(&mut machine);
        let draft = host.snapshots.begin("aa11").unwrap();
        let disk = draft.path().join(DISK);
        sparse(&disk, 10 << 30, &[(4096, b"disk"), (9 << 30, &[7; 9000])]);
        time(&disk, 1_700_000_000_987_654_321);
        let memory = u64::from(MIB) << 20;
        sparse(&draft.snapshot().join(MEMORY), memory, &[(8192, &[1; 5000]), (memory - 1, b"e")]);
        let has_card = machine.config.network.mode != Mode::None;
        fs::write(draft.snapshot().join(STATE), state(&rootfs_of(&host), &disk, has_card)).unwrap();
        draft.publish(&Record::of(&machine, "aa11", Some("warm"))).unwrap();
        host
    }

    fn new() -> Host {
        Host::with(|_| {})
    }

    fn export(&self, rootfs: bool) -> Vec<u8> {
        let record = self.snapshots.find("warm").unwrap();
        let mut bytes = Vec::new();
        let directory = self.snapshots.directory_of(&record.id);
        export(&record, &directory, &self.store, rootfs, &mut bytes).unwrap();
        bytes
    }

    fn import(&self, bytes: &[u8]) -> Result<Record, String> {
        import(&self.snapshots, &self.store, bytes, None)
            .map(|(record, _)| record)
            .map_err(|error| error.to_string())
    }

    /// What is refused leaves nothing, and says so in a line and what to do.
    #[track_caller]
    fn refuses(&self, bytes: &[u8], why: &str) {
        let before = self.everything();
        let told = self.import(bytes).unwrap_err();
        let is_clear = told.starts_with("cannot import the snapshot: ") && told.lines().count() == 2;
        assert!(told.contains(why) && is_clear, "{told:?} should tell of {why:?}");
        assert_eq!(self.everything(), before);
    }

    fn everything(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut directories = vec![self.root.join("snapshots"), self.root.join("rootfs")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten() {
                let path = entry.unwrap().path();
                found.push(path.display().to_string());
                directories.extend(path.is_dir().then_some(path));
            }
        }
        found.retain(|path| !path.ends_with(".names"));
        found.sort();
        found
    }
}

fn rootfs_of(host: &Host) -> PathBuf {
    host.store.rootfs(&Digest::of(b"chain")).unwrap()
}

/// A true state, with the header of a machine with those two disks.
fn state(rootfs: &Path, disk: &Path, has_card: bool) -> Vec<u8> {
    let fixture = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../vmm/tests/fixtures/state-1")).unwrap();
    let (mut header, sections) = format::decode(&fixture).unwrap();
    let mut state = State::decode(&sections).unwrap();
    header.spec = serde_json::from_value(serde_json::json!({
        "cpus": 1, "memory_mib": MIB, "kernel": "/k", "console": "stdio",
        "disks": [{"files": ["/a"], "read_only": true}, {"files": ["/b"], "read_only": false}],
        "nets": if has_card { serde_json::json!([{"tap": "t0", "mac": [2, 0, 0, 0, 0, 1]}]) } else { serde_json::json!([]) },
        "vsock": {"guest_cid": 3, "socket": "/s"},
    }))
    .unwrap();
    header.disks = Some(vec![id(rootfs), id(disk)]);
    header.memory = MemorySummary { bytes: u64::from(MIB) << 20, base: false, checksum: None };
    state.memory.extents = None;
    save::encode(&header, &state).unwrap()
}

/// The entries of an archive, to be changed and written again.
type Entries = Vec<(String, EntryType, Vec<u8>)>;

/// As the archive itself has them: sparse files with their maps, so that they stay small.
fn entries(bytes: &[u8]) -> (Vec<u8>, serde_json::Value) {
    let mut tar = Vec::new();
    zstd::Decoder::new(bytes).unwrap().read_to_end(&mut tar).unwrap();
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut first = archive.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(first.path_bytes().as_ref(), MANIFEST.as_bytes());
    let mut text = Vec::new();
    first.read_to_end(&mut text).unwrap();
    let manifest = serde_json::from_slice(&text).unwrap();
    let behind = 512 + text.len().next_multiple_of(512);
    (tar.split_off(behind), manifest)
}

fn with_manifest(manifest: &serde_json::Value, behind: &[u8]) -> Vec<u8> {
    let mut tar = tar_of(&vec![(MANIFEST.into(), EntryType::Regular, serde_json::to_vec(manifest).unwrap())]);
    tar.truncate(tar.len() - 1024);
    tar.extend(behind);
    tar
}

fn tar_of(entries: &Entries) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (name, kind, content) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o777);
        let bytes = header.as_old_mut();
        bytes.name[..name.len()].copy_from_slice(name.as_bytes());
        if kind.is_symlink() || kind.is_hard_link() {
            header.as_old_mut().linkname[..11].copy_from_slice(b"/etc/passwd");
        }
        header.set_cksum();
        tar.append(&header, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// A valid archive with another manifest.
fn changed(host: &Host, change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let (behind, mut manifest) = entries(&host.export(true));
    change(&mut manifest);
    with_manifest(&manifest, &behind)
}

#[test]
fn what_was_exported_is_imported_with_holes_and_times() {
    let (here, there) = (Host::new(), Host::empty());
    let bytes = here.export(true);
    assert!(bytes.len() < 100_000, "{} bytes", bytes.len());
    let record = there.import(&bytes).unwrap();
    assert_eq!((record.name.as_str(), record.machine.name.as_str()), ("warm", "web"));
    let (from, to) = (here.snapshots.directory_of("aa11"), there.snapshots.directory_of(&record.id));
    for name in [DISK, "snapshot/memory", "snapshot/state"] {
        let (old, new) = (from.join(name), to.join(name));
        let digest = |path: &Path| super::digest::digest(&File::open(path).unwrap()).unwrap();
        assert_eq!(digest(&old), digest(&new), "{name}");
        assert!(new.metadata().unwrap().blocks() * 512 < 1 << 20, "{name} has lost its holes");
        assert_eq!(new.metadata().unwrap().mode() & 0o777, 0o600, "{name}");
    }
    assert_eq!(id(&from.join(DISK)), id(&to.join(DISK)));
    // It stands on the root filesystem that it knows, and keeps that.
    let chain_id: Digest = record.machine.chain_id.parse().unwrap();
    assert_eq!(id(&rootfs_of(&here)), id(&there.store.rootfs(&chain_id).unwrap()));
    let keep = crate::rootfs::in_use(&[], &there.snapshots.list().unwrap());
    assert!(there.store.prune(&PruneOptions { all: true, keep }).unwrap().rootfs.is_empty());
    // And again: what is there is used.
    there.snapshots.remove(&record.id).unwrap();
    assert_eq!(there.import(&here.export(false)).unwrap().machine.chain_id, record.machine.chain_id);
}

#[test]
fn a_host_that_has_the_same_root_filesystem_needs_no_other() {
    let here = Host::new();
    let (with, without) = (here.export(true), here.export(false));
    assert!(without.len() < with.len());
    here.snapshots.remove("aa11").unwrap();
    let record = here.import(&without).unwrap();
    assert_eq!(record.machine.chain_id, Digest::of(b"chain").to_string());
    assert!(here.import(&with).unwrap_err().contains("the name 'warm' belongs to"));
    Host::empty().refuses(&without, "without its root filesystem");
}

#[test]
fn an_image_that_was_unpacked_anew_is_another_root_filesystem() {
    let (here, there) = (Host::new(), Host::empty());
    let other = there.root.join("other");
    sparse(&other, images::ROOTFS_BYTES, &[(1 << 20, b"rootfs")]);
    there.store.adopt_rootfs(&Digest::of(b"chain"), &other).unwrap();
    there.refuses(&here.export(false), "without its root filesystem");
    let record = there.import(&here.export(true)).unwrap();
    assert_ne!(record.machine.chain_id, Digest::of(b"chain").to_string());
}

#[test]
fn a_tar_that_somebody_has_decompressed_is_as_good() {
    let (here, there) = (Host::new(), Host::empty());
    there.import(&changed(&here, |_| {})).unwrap();
}

#[test]
fn what_is_cut_short_anywhere_is_refused() {
    let (here, there) = (Host::new(), Host::empty());
    let bytes = here.export(true);
    for end in (0..bytes.len()).step_by(bytes.len() / 40).chain([bytes.len() - 1, bytes.len() - 4]) {
        there.refuses(&bytes[..end], "");
    }
    let tar = changed(&here, |_| {});
    for end in (0..tar.len() - 2048).step_by(tar.len() / 40) {
        there.refuses(&tar[..end], "");
    }
}

#[test]
fn a_bit_that_changed_anywhere_is_noticed() {
    let (here, there) = (Host::new(), Host::empty());
    let (behind, manifest) = entries(&here.export(true));
    for at in [behind.len() / 20, behind.len() / 5, behind.len() / 2] {
        let mut behind = behind.clone();
        // In the content, not in a head or its padding.
        let at = (at..).find(|at| behind[*at] != 0).unwrap();
        behind[at] ^= 0x10;
        there.refuses(&with_manifest(&manifest, &behind), "");
    }
    let mut bytes = here.export(true);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    there.refuses(&bytes, "");
}

#[test]
fn what_is_no_export_is_refused() {
    let there = Host::empty();
    for bytes in [&b""[..], b"nonsense", &[0; 4096], &[0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3], &[0xff; 2048]] {
        there.refuses(bytes, "cannot import the snapshot");
    }
    for name in ["../x", "/etc/passwd", "state", "snapshot.json/", "./snapshot.json"] {
        there.refuses(&tar_of(&vec![(name.into(), EntryType::Regular, b"{}".to_vec())]), "no snapshot");
    }
    for kind in [EntryType::Symlink, EntryType::Link, EntryType::Directory, EntryType::Fifo] {
        there.refuses(&tar_of(&vec![(MANIFEST.into(), kind, vec![])]), "no snapshot");
    }
    there.refuses(&tar_of(&vec![(MANIFEST.into(), EntryType::Regular, b"[]".to_vec())]), MANIFEST);
    there.refuses(
        &tar_of(&vec![(MANIFEST.into(), EntryType::Regular, b"{\"version\":9}".to_vec())]),
        "version 9",
    );
}

#[test]
fn a_file_under_another_name_or_of_another_kind_is_refused() {
    let (here, there) = (Host::new(), Host::empty());
    let (_, manifest) = entries(&here.export(true));
    let state = fs::read(here.snapshots.directory_of("aa11").join("snapshot/state")).unwrap();
    for name in ["../state", "/state", "memory", "./state", "state/"] {
        let tar = tar_of(&vec![(name.into(), EntryType::Regular, state.clone())]);
        there.refuses(&with_manifest(&manifest, &tar), "state is not what it tells");
    }
    for kind in [EntryType::Symlink, EntryType::Link, EntryType::Directory, EntryType::Char] {
        let tar = tar_of(&vec![(STATE.into(), kind, vec![])]);
        there.refuses(&with_manifest(&manifest, &tar), "state is not what it tells");
    }
    let twice =
        vec![(STATE.into(), EntryType::Regular, state.clone()), (STATE.into(), EntryType::Regular, state)];
    there.refuses(&with_manifest(&manifest, &tar_of(&twice)), "memory is not what it tells");
}

#[test]
fn a_manifest_that_tells_what_cannot_be_is_refused() {
    let (here, there) = (Host::new(), Host::empty());
    let refuses =
        |why: &str, change: &dyn Fn(&mut serde_json::Value)| there.refuses(&changed(&here, change), why);
    refuses("list of files", &|it| _ = it["files"].as_array_mut().unwrap().remove(2));
    refuses("list of files", &|it| it["files"].as_array_mut().unwrap().swap(0, 1));
    refuses("list of files", &|it| it["files"][1]["name"] = "../memory".into());
    refuses("longer than any", &|it| it["files"][2]["bytes"] = (1u64 << 60).into());
    refuses("two root filesystems", &|it| it["rootfs"]["bytes"] = 7.into());
    refuses("memory is not as long", &|it| it["files"][1]["bytes"] = 4096.into());
    refuses("disks are not", &|it| it["files"][2]["bytes"] = 4096.into());
    refuses("different size", &|it| it["record"]["machine"]["config"]["memory"] = 4096.into());
    refuses("disk.ext4 is not what was exported", &|it| {
        it["files"][2]["digest"] = Digest::of(b"other").to_string().into();
    });
    refuses("version 2", &|it| it["version"] = 2.into());
    refuses("version 1.9", &|it| it["record"]["machine"]["version"] = 9.into());
}

#[test]
fn what_a_record_asks_of_its_host_is_refused() {
    let (here, there) = (Host::new(), Host::empty());
    let refuses = |why: &str, change: &dyn Fn(&mut serde_json::Value)| {
        there.refuses(&changed(&here, |it| change(&mut it["record"]["machine"])), why);
    };
    let volume = || serde_json::json!([{"name": "data", "path": "/d", "read_only": true}]);
    refuses("volumes", &|it| it["config"]["volumes"] = volume());
    refuses("directories", &|it| {
        it["config"]["shares"] = serde_json::json!([{"source": "/etc", "path": "/d", "read_only": true}]);
    });
    refuses("kernel", &|it| it["config"]["kernel"] = "/dev/zero".into());
    refuses("configuration", &|it| it["config"]["stop_signal"] = 99.into());
    refuses("configuration", &|it| it["config"]["cpus"] = 77.into());
    refuses("configuration", &|it| it["config"]["run"]["hostname"] = "a b".into());
    refuses("different parts", &|it| it["config"]["network"]["mode"] = "default".into());
    refuses("name", &|it| it["name"] = "../../x".into());
    refuses("image", &|it| it["image"] = "\u{1b}[31m".into());
    refuses("chain id", &|it| it["chain_id"] = "../../etc".into());
}

#[test]
fn what_needs_more_than_is_in_it_is_not_exported() {
    let told = |change: fn(&mut machine::Record)| {
        let host = Host::with(change);
        let record = host.snapshots.find("warm").unwrap();
        let directory = host.snapshots.directory_of("aa11");
        let mut bytes = Vec::new();
        let error = export(&record, &directory, &host.store, true, &mut bytes).unwrap_err();
        assert!(bytes.is_empty());
        error.to_string()
    };
    let told_volume = told(|machine| {
        machine.config.volumes.push(crate::volume::Use {
            name: "data".into(),
            path: "/d".into(),
            read_only: true,
        });
    });
    assert!(told_volume.contains("'data'"), "{told_volume}");
    assert!(told(|machine| machine.config.kernel = Some("/own/kernel".into())).contains("/own/kernel"));
}

#[test]
fn endless_heads_are_not_read() {
    let (here, there) = (Host::new(), Host::empty());
    let (_, manifest) = entries(&here.export(true));
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.as_old_mut().name[..5].copy_from_slice(b"state");
    header.as_gnu_mut().unwrap().set_is_extended(true);
    header.set_size(0);
    header.set_cksum();
    // A head of a sparse file that says, in each block, that another follows.
    let mut extended = [0; 512];
    extended[504] = 1;
    let mut tar = header.as_bytes().to_vec();
    for _ in 0..10_000 {
        tar.write_all(&extended).unwrap();
    }
    there.refuses(&with_manifest(&manifest, &tar), "longer than it may be");
    // A name that never ends.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.resize(4 << 20, b'a');
    there.refuses(&with_manifest(&manifest, &tar), "longer than it may be");
}

#[test]
fn a_named_network_is_not_joined_by_itself() {
    let here = Host::with(|machine| machine.config.network.mode = Mode::Named("shop".into()));
    let there = Host::empty();
    let (record, left) =
        import(&there.snapshots, &there.store, here.export(true).as_slice(), Some("other")).unwrap();
    assert_eq!((record.name.as_str(), &record.machine.config.network.mode), ("other", &Mode::Default));
    assert!(left.unwrap().contains("'shop'"));
}

#[test]
fn whatever_is_changed_is_refused_or_makes_no_difference() {
    let (here, there) = (Host::new(), Host::empty());
    let tar = changed(&here, |_| {});
    let whole = there.import(&tar).unwrap();
    let digest = |record: &Record, name: &str| {
        let path = there.snapshots.directory_of(&record.id).join(name);
        super::digest::digest(&File::open(path).unwrap()).unwrap()
    };
    let names = ["snapshot/state", "snapshot/memory", DISK];
    let digests = names.map(|name| digest(&whole, name));
    there.snapshots.remove(&whole.id).unwrap();
    let before = there.everything();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |bound: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize % bound
    };
    for _ in 0..150 {
        let mut bytes = tar.clone();
        // Heads as often as content, which is most of it.
        let at = if below(2) == 0 { below(6000) } else { below(bytes.len()) };
        match below(3) {
            0 => bytes[at] ^= 1 << below(8),
            1 => drop(bytes.drain(at..(at + 1 + below(600)).min(tar.len()))),
            _ => {
                let part: Vec<u8> = bytes[at..(at + 512).min(tar.len())].to_vec();
                let to = below(bytes.len());
                bytes.splice(to..to, part);
            }
        }
        if let Ok(record) = there.import(&bytes) {
            assert_eq!(names.map(|name| digest(&record, name)), digests);
            there.snapshots.remove(&record.id).unwrap();
        }
        assert_eq!(there.everything(), before);
    }
}
