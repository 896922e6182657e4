//! Images: those that tests/images/build made by real tools, and those a test makes itself, as hostile as it likes.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::tar::Tar;

/// The directory that tests/images/build printed.
pub fn directory() -> PathBuf {
    let directory = std::env::var_os("FLYRUN_TEST_IMAGES").map(PathBuf::from);
    directory.expect("FLYRUN_TEST_IMAGES is not set: run the tests by `make e2e`")
}

/// The OCI layout of one of the images made by real tools.
pub fn layout(name: &str) -> String {
    format!("oci:{}", directory().join("oci").join(name).display())
}

/// The smallest image: busybox and its applets.
pub fn busybox() -> String {
    layout("busybox")
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

/// A layer: its blob, and what the image says about it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The bytes in the layout.
    pub blob: Vec<u8>,
    /// Digest that the manifest tells.
    pub digest: String,
    /// Digest of the uncompressed tar that the configuration tells.
    pub diff_id: String,
    /// Ending of the media type: tar, tar+gzip or tar+zstd.
    pub kind: &'static str,
}

impl Layer {
    /// A plain tar.
    pub fn plain(tar: Vec<u8>) -> Layer {
        let digest = sha256(&tar);
        Layer { diff_id: digest.clone(), digest, blob: tar, kind: "tar" }
    }

    /// A tar in gzip.
    pub fn gzip(tar: &[u8]) -> Layer {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(tar).unwrap();
        let blob = encoder.finish().unwrap();
        Layer { digest: sha256(&blob), diff_id: sha256(tar), blob, kind: "tar+gzip" }
    }

    /// A tar in Zstandard.
    pub fn zstd(tar: &[u8]) -> Layer {
        let blob = zstd::bulk::compress(tar, 1).unwrap();
        Layer { digest: sha256(&blob), diff_id: sha256(tar), blob, kind: "tar+zstd" }
    }

    /// A static busybox as /bin/sh and all other programs the tests call.
    pub fn busybox() -> Layer {
        let program = std::fs::read("/bin/busybox").expect("busybox-static is not installed");
        let mut tar = Tar::new().directory("bin").directory("etc").directory("tmp").file(
            "bin/busybox",
            0o755,
            &program,
        );
        for applet in
            ["sh", "ls", "cat", "stat", "echo", "sha256sum", "find", "wc", "id", "readlink", "test", "du"]
        {
            tar = tar.symlink(&format!("bin/{applet}"), "busybox");
        }
        Layer::gzip(&tar.finish())
    }
}

/// Writes an OCI layout of these layers, with `config` as the configuration's `config`. Gives its reference.
pub fn write_layout(directory: &Path, layers: &[Layer], config: &Value) -> String {
    let blobs = directory.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        std::fs::write(blobs.join(&digest), bytes).unwrap();
        digest
    };
    for layer in layers {
        std::fs::write(blobs.join(&layer.digest), &layer.blob).unwrap();
    }
    let diff_ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let descriptors: Vec<_> = layers
        .iter()
        .map(|layer| {
            json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.{}", layer.kind),
                "digest": format!("sha256:{}", layer.digest),
                "size": layer.blob.len(),
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{}", put(config.as_bytes())),
            "size": config.len(),
        },
        "layers": descriptors,
    })
    .to_string();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{}", put(manifest.as_bytes())),
            "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": "latest" },
        }],
    });
    std::fs::write(directory.join("index.json"), index.to_string()).unwrap();
    std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("oci:{}", directory.display())
}
