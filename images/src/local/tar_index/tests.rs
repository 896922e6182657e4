use std::io::Write;

use proptest::prelude::*;

use super::*;

fn header(name: &str, kind: u8, size: u64, link: &str) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    block[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut block);
    block
}

fn seal(block: &mut [u8]) {
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn entry(name: &str, kind: u8, data: &[u8], link: &str) -> Vec<u8> {
    let mut bytes = header(name, kind, data.len() as u64, link);
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn index(bytes: &[u8]) -> Result<TarIndex> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    TarIndex::open(file.path())
}

fn text(index: &TarIndex, name: &str) -> Option<String> {
    let mut text = String::new();
    index.file(name)?.0.read_to_string(&mut text).unwrap();
    Some(text)
}

#[test]
fn files_are_found_through_links_that_stay_inside() {
    let parts = [
        entry("./a/layer.tar", b'0', b"one", ""),
        entry("b/layer.tar", b'2', b"", "../a/layer.tar"),
        entry("c", b'1', b"", "b/layer.tar"),
        entry("out", b'2', b"", "../../etc/passwd"),
        entry("absolute", b'2', b"", "/etc/passwd"),
        entry("loop", b'2', b"", "loop"),
        entry("../escape", b'0', b"no", ""),
    ];
    let index = index(&parts.concat()).unwrap();
    assert_eq!(text(&index, "a/layer.tar").as_deref(), Some("one"));
    assert_eq!(text(&index, "c").as_deref(), Some("one"));
    for name in ["out", "absolute", "loop", "../escape", "escape", "/a/layer.tar", ""] {
        assert_eq!(text(&index, name), None, "{name}");
    }
}

#[test]
fn long_names_of_pax_and_gnu_are_read_and_the_last_entry_of_a_name_wins() {
    let long = "d/".repeat(80) + "f";
    let record = format!(" path={long}\n");
    let length = record.len() + 3;
    let pax = format!("{length}{record}");
    let parts = [
        entry("pax", b'x', pax.as_bytes(), ""),
        entry("short", b'0', b"first", ""),
        entry("././@LongLink", b'L', format!("{long}\0").as_bytes(), ""),
        entry("short", b'0', b"second", ""),
    ];
    let index = index(&parts.concat()).unwrap();
    assert_eq!(text(&index, &long).as_deref(), Some("second"));
    assert_eq!(text(&index, "short"), None);
}

#[test]
fn sizes_beyond_the_file_are_refused() {
    for size in [1, 512, u64::from(u32::MAX)] {
        let error = index(&header("x", b'0', size, "")).unwrap_err().to_string();
        assert!(error.contains("truncated"), "{error}");
    }
    let mut huge = header("x", b'0', 0, "");
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    seal(&mut huge);
    assert!(index(&huge).is_err());
}

#[test]
fn a_huge_extended_header_is_refused_before_it_is_read() {
    let bytes = entry("x", b'L', &vec![b'a'; MAX_HEADER_BYTES as usize + 1], "");
    assert!(matches!(index(&bytes), Err(Error::TooLarge { .. })));
}

#[test]
fn a_compressed_archive_is_called_so() {
    let mut bytes = vec![0x1f, 0x8b];
    bytes.resize(1024, 1);
    assert!(index(&bytes).unwrap_err().to_string().contains("gunzip"));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let _ = index(&bytes);
    }

    #[test]
    fn no_headers_make_it_panic_or_read_outside(
        entries in proptest::collection::vec(
            ("[a-c/.]{0,8}", prop::sample::select(b"0123456xgLK7\0".to_vec()), 0u64..2000, "[a-c/.]{0,8}", "\\PC{0,40}"),
            0..12,
        ),
        cut in 0usize..8000,
    ) {
        let mut bytes = Vec::new();
        for (name, kind, size, link, data) in &entries {
            bytes.extend(header(name, *kind, *size, link));
            let mut data = data.clone().into_bytes();
            data.resize((*size as usize).next_multiple_of(512), b'x');
            bytes.extend(data);
        }
        bytes.truncate(bytes.len().saturating_sub(cut % (bytes.len() + 1)));
        if let Ok(index) = index(&bytes) {
            for (name, _, size, _, _) in &entries {
                if let Some((mut section, announced)) = index.file(name) {
                    let mut read = Vec::new();
                    section.read_to_end(&mut read).unwrap();
                    prop_assert_eq!(read.len() as u64, announced);
                    prop_assert!(announced <= bytes.len() as u64 || *size == 0);
                }
            }
        }
    }
}
