//! `WWW-Authenticate` (RFC 9110, section 11.6.1), as far as registries use it.

/// Longest header that is parsed, in bytes.
const MAX_LENGTH: usize = 8192;

/// What a registry wants to see before it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password.
    Basic,
    /// A token that another address gives.
    Bearer {
        /// The address.
        realm: String,
        /// What to tell it.
        service: Option<String>,
        /// What to ask it for.
        scope: Option<String>,
    },
}

impl Challenge {
    /// The best of the challenges in a header: a token rather than a password.
    pub(super) fn parse(header: &str) -> Option<Self> {
        if header.len() > MAX_LENGTH {
            return None;
        }
        let mut best = None;
        let mut rest = header.trim_start();
        while !rest.is_empty() {
            let (scheme, after) = take_token(rest)?;
            let (parameters, after) = take_parameters(after);
            rest = after.trim_start_matches([',', ' ', '\t']);
            let get = |wanted: &str| {
                let found = parameters.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
                found.map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = get("realm")
            {
                return Some(Self::Bearer { realm, service: get("service"), scope: get("scope") });
            }
            if scheme.eq_ignore_ascii_case("basic") {
                best = Some(Self::Basic);
            }
        }
        best
    }
}

/// Comma-separated `name=value` pairs, up to what is not one: the next scheme.
fn take_parameters(mut text: &str) -> (Vec<(&str, String)>, &str) {
    let mut parameters = Vec::new();
    loop {
        let start = text.trim_start_matches([',', ' ', '\t']);
        let Some((name, after)) = take_token(start) else { return (parameters, start) };
        let Some(value) = after.trim_start().strip_prefix('=') else { return (parameters, start) };
        let Some((value, after)) = take_value(value.trim_start()) else { return (parameters, "") };
        parameters.push((name, value));
        text = after;
    }
}

fn take_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (token, rest) = take_token(text)?;
        return Some((token.into(), rest));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return Some((value, quoted.get(index + 1..)?)),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

/// A token of RFC 9110, section 5.6.2, or the token68 characters that unquoted values use.
fn take_token(text: &str) -> Option<(&str, &str)> {
    let is_token =
        |character: char| character.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/:".contains(character);
    let end = text.find(|character| !is_token(character)).unwrap_or(text.len());
    if end == 0 { None } else { text.split_at_checked(end) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn docker_hubs_challenge_is_read() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/alpine:pull""#;
        let wanted = Challenge::Bearer {
            realm: "https://auth.docker.io/token".into(),
            service: Some("registry.docker.io".into()),
            scope: Some("repository:library/alpine:pull".into()),
        };
        assert_eq!(Challenge::parse(header), Some(wanted));
    }

    #[test]
    fn a_token_is_preferred_to_a_password() {
        assert_eq!(Challenge::parse(r#"Basic realm="x y""#), Some(Challenge::Basic));
        let both = Challenge::parse(r#"Basic realm="a, Bearer", Bearer realm="https://t""#);
        assert_eq!(both, Some(Challenge::Bearer { realm: "https://t".into(), service: None, scope: None }));
        assert_eq!(Challenge::parse("Negotiate"), None);
        assert_eq!(Challenge::parse("Bearer"), None);
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(header in r#"((Basic|Bearer|x) ?|(realm|scope|,|=|"|\\| |é))*"#) {
            let _ = Challenge::parse(&header);
        }
    }
}
