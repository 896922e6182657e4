use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn descriptor(media_type: &str, byte: u8) -> Value {
    json!({"mediaType": media_type, "digest": Digest::from_bytes([byte; 32]), "size": 7})
}

fn manifest_with_layer(media_type: &str) -> Value {
    json!({
        "schemaVersion": 2,
        "config": descriptor("application/vnd.oci.image.config.v1+json", 1),
        "layers": [descriptor(media_type, 2)],
    })
}

fn assemble_json(manifest: &Value, config: &Value) -> Result<Image> {
    let store = Store::open("/nowhere");
    let Document::Manifest(manifest) = parse_document(manifest.to_string().as_bytes(), "x")? else {
        panic!()
    };
    let configuration = parse_config(config.to_string().as_bytes(), "x")?;
    assemble(&store, "x", Digest::of(b"m"), &manifest, configuration, &Platform::default())
}

fn config_for(byte: u8) -> Value {
    json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [Digest::from_bytes([byte; 32])]}})
}

#[test]
fn nulls_of_go_and_additions_of_docker_are_understood() {
    let config = json!({
        "os": "linux", "architecture": "amd64", "created": "2024-01-01T00:00:00Z",
        "config": {
            "Entrypoint": null, "Cmd": ["sh", "-c", "true"], "Env": ["A=1"], "User": "postgres", "Volumes": {"/data": {}},
            "ExposedPorts": {"80/tcp": {}}, "Labels": null, "WorkingDir": "/w", "StopSignal": "SIGQUIT",
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5_000_000_000i64, "Retries": 3},
        },
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"")]},
    });
    let parsed = parse_config(config.to_string().as_bytes(), "x").unwrap().config;
    assert_eq!(parsed.cmd, ["sh", "-c", "true"]);
    assert!(parsed.entrypoint.is_empty() && parsed.labels.is_empty());
    assert_eq!((parsed.volumes, parsed.exposed_ports), (vec!["/data".into()], vec!["80/tcp".to_string()]));
    assert_eq!((parsed.working_dir.as_str(), parsed.stop_signal.as_deref()), ("/w", Some("SIGQUIT")));
    let healthcheck = parsed.healthcheck.unwrap();
    assert_eq!((healthcheck.interval_ns, healthcheck.retries), (5_000_000_000, 3));
}

#[test]
fn layers_that_flyrun_cannot_use_are_refused_by_their_type() {
    for (media_type, word) in [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign"),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
        ("application/vnd.oci.image.layer.v1.tar+lz4", "tar+lz4"),
        ("application/vnd.wasm.content.layer.v1+wasm", "wasm"),
    ] {
        let error = assemble_json(&manifest_with_layer(media_type), &config_for(2)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(word), "{error}");
    }
}

#[test]
fn schema_1_is_refused_by_name() {
    let error = parse_document(br#"{"schemaVersion":1,"fsLayers":[],"history":[]}"#, "old").unwrap_err();
    assert!(error.to_string().contains("schema 1"), "{error}");
}

#[test]
fn an_uncompressed_layer_must_be_its_diff_id() {
    let manifest = manifest_with_layer("application/vnd.oci.image.layer.v1.tar");
    assert!(assemble_json(&manifest, &config_for(2)).is_ok());
    assert!(matches!(assemble_json(&manifest, &config_for(3)), Err(Error::Malformed { .. })));
}

#[test]
fn another_machines_image_is_refused() {
    let mut config = config_for(2);
    config["architecture"] = "arm64".into();
    let error =
        assemble_json(&manifest_with_layer("application/vnd.oci.image.layer.v1.tar"), &config).unwrap_err();
    assert!(error.to_string().contains("linux/amd64; it has linux/arm64"), "{error}");
}

#[test]
fn the_plainest_variant_of_the_platform_is_chosen_and_others_are_listed() {
    let entry = |os: &str, architecture: &str, variant: Option<&str>, byte: u8| {
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", byte);
        entry["platform"] = json!({"os": os, "architecture": architecture, "variant": variant});
        entry
    };
    let index = json!({"schemaVersion": 2, "manifests": [
        entry("linux", "amd64", Some("v3"), 1), entry("linux", "amd64", None, 2), entry("linux", "arm64", Some("v8"), 3),
        entry("unknown", "unknown", None, 4),
    ]});
    let Document::Index(index) = parse_document(index.to_string().as_bytes(), "x").unwrap() else { panic!() };
    let chosen = index.select(&Platform::default(), "x").unwrap();
    assert_eq!(chosen.digest().unwrap(), Digest::from_bytes([2; 32]));
    let error = index.select(&"linux/riscv64".parse().unwrap(), "x").unwrap_err().to_string();
    assert!(error.ends_with("it has linux/amd64/v3, linux/amd64, linux/arm64/v8"), "{error}");
}

#[test]
fn the_chain_id_is_the_specs() {
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    assert_eq!(chain_id(&[]), None);
    assert_eq!(chain_id(&[a]), Some(a));
    assert_eq!(chain_id(&[a, b]), Some(Digest::of(format!("{a} {b}").as_bytes())));
}

#[test]
fn too_many_layers_are_refused() {
    let mut manifest = manifest_with_layer("application/vnd.oci.image.layer.v1.tar");
    manifest["layers"] = vec![descriptor("application/vnd.oci.image.layer.v1.tar", 2); MAX_LAYERS + 1].into();
    assert!(matches!(assemble_json(&manifest, &config_for(2)), Err(Error::TooLarge { .. })));
}

proptest! {
    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_document(&bytes, "x");
        let _ = parse_config(&bytes, "x");
    }

    #[test]
    fn no_json_makes_them_panic(
        text in r#"\{"(schemaVersion|config|rootfs)":(2|1|null|\{\}|\{"diff_ids":(null|\["sha256:x"\])\}),"(layers|manifests|mediaType|config)":(\[\]|null|"x"|\[\{"digest":"sha256:0","size":-1\}\])\}"#
    ) {
        let _ = parse_document(text.as_bytes(), "x");
        let _ = parse_config(text.as_bytes(), "x");
    }
}
