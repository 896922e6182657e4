//! What the fuzz targets in `fuzz/` hold true of any bytes that an image, a registry or an archive can hold. Their seeds, what was
//! once found among them, are run by this module's test too.
//!
//! Each function panics where it is not so.
#![allow(missing_docs, reason = "the names are those of the targets")]

use std::path::Path;

use crate::{Digest, Platform, Reference, Store, local, oci, registry, store};

/// Manifests, indexes and configurations, and what is made of them together.
pub fn documents(bytes: &[u8]) {
    let name = "an image";
    let wanted = Platform::default();
    if let Ok(oci::Document::Index(index)) = oci::parse_document(bytes, name)
        && let Ok(entry) = index.select(&wanted, name)
    {
        assert!(entry.is_manifest());
        let _ = entry.digest();
    }
    let (first, second) = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(at) => bytes.split_at(at),
        None => (bytes, bytes),
    };
    let Ok(configuration) = oci::parse_config(second, name) else { return };
    let config = &configuration.config;
    let words = config.entrypoint.iter().chain(&config.cmd).chain(&config.env);
    assert!(words.chain([&config.user, &config.working_dir]).all(|word| !word.contains('\0')));
    let Ok(oci::Document::Manifest(manifest)) = oci::parse_document(first, name) else { return };
    let store = Store::open("/nowhere");
    let ids = configuration.diff_ids.clone();
    if let Ok(image) = oci::assemble(&store, name, Digest::of(first), &manifest, configuration, &wanted) {
        assert!(image.layers.iter().map(|layer| layer.diff_id).eq(ids.iter().copied()));
        assert_eq!(oci::chain_id(&ids), Some(image.chain_id));
        assert!(image.layers.iter().all(|layer| layer.path.starts_with("/nowhere/blobs/sha256")));
    }
}

/// What a user types is what its canonical name says.
pub fn reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(reference) = Reference::parse(text) {
        let name = reference.canonical_name();
        assert_eq!(Reference::parse(&name).map(|again| again.canonical_name()), Ok(name));
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(platform) = text.parse::<Platform>() {
        assert_eq!(platform.to_string(), text);
    }
}

/// Header fields, tokens and errors of a registry, and the head of the docker daemon's answer.
pub fn answers(bytes: &[u8]) {
    registry::fuzzing::answer(bytes);
    local::fuzzing::daemon(bytes);
}

/// A tar that may be an image's. `directory` is the target's own.
pub fn archive(directory: &Path, bytes: &[u8]) {
    local::fuzzing::archive(directory, bytes);
}

/// An OCI layout. `directory` is the target's own.
pub fn layout(directory: &Path, bytes: &[u8]) {
    local::fuzzing::layout(directory, bytes);
}

/// What the store has written down of an image.
pub fn record(bytes: &[u8]) {
    store::fuzz_record(bytes);
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    type Target<'a> = &'a dyn Fn(&[u8]);

    #[test]
    fn what_the_fuzz_targets_begin_with_holds() {
        let directory = tempfile::tempdir().unwrap();
        let targets: &[(&str, Target)] = &[
            ("answers", &answers),
            ("archive", &|bytes| archive(directory.path(), bytes)),
            ("documents", &documents),
            ("layout", &|bytes| layout(directory.path(), bytes)),
            ("record", &record),
            ("reference", &reference),
        ];
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (name, target) in targets {
            let seeds = fs::read_dir(corpus.join(name)).unwrap().map(|seed| seed.unwrap().path());
            let count = seeds.map(|seed| target(&fs::read(seed).unwrap())).count();
            assert!(count > 0, "{name} has no seeds");
        }
    }
}
