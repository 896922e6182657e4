use proptest::prelude::*;

use super::*;

/// A file system with a layout at `/l`, `/l:x`, a directory at `/d` and files at `/a.tar`, `/odd:name.tar` and `here.tar`.
fn look(path: &Path) -> AtPath {
    match path.to_str().unwrap_or_default() {
        "/l" | "/l:x" => AtPath::OciLayout,
        "/d" => AtPath::Directory,
        "/a.tar" | "/odd:name.tar" => AtPath::File,
        path if Path::new(path).file_name().is_some_and(|name| name == "here.tar") => AtPath::File,
        _ => AtPath::Nothing,
    }
}

fn parse(text: &str) -> Result<Reference, ReferenceError> {
    Reference::parse_with(text, &look)
}

fn canonical(text: &str) -> String {
    parse(text).unwrap().canonical_name()
}

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn names_get_what_docker_leaves_out() {
    for (text, wanted) in [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("docker://alpine", "docker.io/library/alpine:latest"),
        ("docker:24", "docker.io/library/docker:24"),
        ("docker", "docker.io/library/docker:latest"),
        ("user/app", "docker.io/user/app:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
        ("[::1]:5000/x/y:z", "[::1]:5000/x/y:z"),
        ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000/a/b/c:v1"),
        ("quay.io/a/b__c.d-e---f:T_1", "quay.io/a/b__c.d-e---f:T_1"),
    ] {
        assert_eq!(canonical(text), wanted, "{text}");
    }
    let digest = format!("ghcr.io/a/b@sha256:{HEX}");
    assert_eq!(canonical(&digest), digest);
    assert_eq!(canonical(&format!("ghcr.io/a/b:v1@sha256:{HEX}")), digest, "the digest decides");
    let Source::Registry(name) = parse("alpine:3.20").unwrap().source else { panic!() };
    assert_eq!(name.familiar_name(), "alpine:3.20");
}

#[test]
fn malformed_names_are_refused_by_their_part() {
    use ReferenceError as E;
    assert_eq!(parse(""), Err(E::Empty));
    assert!(matches!(parse("docker://"), Err(E::Empty)));
    assert!(matches!(parse(&"a".repeat(5000)), Err(E::TooLong(5000))));
    assert!(matches!(parse("a\nb"), Err(E::Character { character: '\n', .. })));
    assert!(matches!(parse("https://hub.docker.com/_/alpine"), Err(E::Url(_))));
    assert!(matches!(parse("containers-storage:x"), Err(E::Transport { .. })));
    assert!(matches!(parse("s3://bucket/x"), Err(E::Transport { .. })));
    assert!(matches!(parse("-bad.example/x"), Err(E::Registry { .. })));
    assert!(matches!(parse("host.example:99999/x"), Err(E::Registry { .. })));
    assert!(matches!(parse("host.example:/x"), Err(E::Registry { .. })));
    assert!(matches!(parse("[::1/x"), Err(E::Registry { .. })));
    assert!(matches!(parse("user@evil.example/x"), Err(E::Digest { .. })));
    assert!(matches!(parse("Alpine"), Err(E::UpperCase { suggestion, .. }) if suggestion == "alpine"));
    for text in ["a//b", "a/", "a/../b", "a..b", "a___b", "_a", "a_", "a b", "ä", "a/./b"] {
        assert!(matches!(parse(text), Err(E::Repository { .. })), "{text}: {:?}", parse(text));
    }
    for text in ["a:", "a:-x", "a:.x", "a:b c", "a:ä"] {
        assert!(matches!(parse(text), Err(E::Tag { .. })), "{text}: {:?}", parse(text));
    }
    assert!(matches!(parse("a@sha512:00"), Err(E::Digest { error: DigestError::Algorithm(_), .. })));
    assert!(matches!(parse("a@sha256:00"), Err(E::Digest { error: DigestError::Malformed(_), .. })));
    assert!(matches!(parse(&format!("a{}", "/b".repeat(130))), Err(E::Repository { .. })));
}

#[test]
fn paths_are_told_from_tags_by_what_exists() {
    let layout =
        |path: &str, tag: Option<&str>| Source::OciLayout { path: path.into(), tag: tag.map(Into::into) };
    let docker =
        |path: &str, tag: Option<&str>| Source::DockerArchive { path: path.into(), tag: tag.map(Into::into) };
    for (text, wanted) in [
        ("oci:/l", layout("/l", None)),
        ("oci:/l:v1", layout("/l", Some("v1"))),
        ("oci:/l:x", layout("/l:x", None)),
        ("oci:/l:x:v1", layout("/l", Some("x:v1"))),
        ("oci:/gone:v1", layout("/gone", Some("v1"))),
        ("/l", layout("/l", None)),
        ("/l:v1", layout("/l", Some("v1"))),
        ("docker-archive:/a.tar:host.example/x:v1", docker("/a.tar", Some("host.example/x:v1"))),
        ("docker-archive:/odd:name.tar", docker("/odd:name.tar", None)),
        ("docker-archive:/odd:name.tar:x", docker("/odd:name.tar", Some("x"))),
        ("/a.tar", Source::Archive { path: "/a.tar".into() }),
    ] {
        assert_eq!(parse(text).unwrap().source, wanted, "{text}");
    }
    assert!(matches!(parse("here.tar").unwrap().source, Source::Archive { path } if path.is_absolute()));
    assert_eq!(canonical("gone.tar"), "docker.io/library/gone.tar:latest");
    assert_eq!(canonical("docker-daemon:x"), "docker-daemon:docker.io/library/x:latest");
    for (text, word) in [
        ("/gone", "no such file"),
        ("/d", "not an OCI image layout"),
        ("/a.tar:x", "oci-archive:FILE:TAG"),
        ("oci:", "missing"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(matches!(parse("oci:/l:"), Err(ReferenceError::Tag { .. })));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,60}|[a-z:/@.\\[\\]]{0,40}") {
        let _ = parse(&text);
    }

    #[test]
    fn canonical_names_mean_themselves(
        text in "(docker://|docker-daemon:)?((localhost|[a-z]{1,5}\\.io|\\[::1\\])(:[1-9][0-9]{0,3})?/)?[a-z0-9]{1,6}([._-][a-z0-9]{1,3})?(/[a-z]{1,4}){0,2}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,5})?"
    ) {
        let reference = parse(&text).unwrap();
        let canonical = reference.canonical_name();
        prop_assert_eq!(parse(&canonical), Ok(reference), "{} is {}", text, canonical);
    }

    #[test]
    fn what_parses_cannot_lead_a_request_astray(text in "[a-zA-Z0-9:/@._%?#&\\[\\] -]{1,40}") {
        if let Ok(Reference { source: Source::Registry(name) }) = parse(&text) {
            let url = format!("https://{}/v2/{}/manifests/{}", name.registry, name.repository, name.tag.unwrap_or_default());
            prop_assert!(!url.contains(['?', '#', '%', '&', ' ', '@']) && !url.contains(".."), "{}", url);
        }
    }
}
