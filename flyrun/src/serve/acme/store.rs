//! What is kept of certificate authorities, below `<root>/acme`: one directory for each, in which are accounts and certificates. Only the
//! owner reads it.

use std::path::{Path, PathBuf};

use instant_acme::AccountCredentials;
use sha2::{Digest as _, Sha256};

use crate::error::{Context as _, Result};
use crate::files::{self, Lasting};
use crate::paths::make_private_dir;

/// Files of accounts and certificates.
pub struct Store {
    root: PathBuf,
}

impl Store {
    pub fn new(root: PathBuf) -> Store {
        Store { root: root.join("acme") }
    }

    /// Of an authority: its host, for people, and the URL of its directory.
    fn place(&self, url: &str) -> PathBuf {
        let rest = url.strip_prefix("https://").unwrap_or(url);
        let host = rest.split(['/', ':', '?', '#', '@']).next().unwrap_or_default();
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
        let host: String = host.chars().filter(is_plain).take(64).collect();
        self.root.join(format!("{}-{}", host.trim_start_matches('.'), short_digest(url)))
    }

    /// An app's certificate, with its key.
    pub fn certificate(&self, url: &str, app: &str) -> PathBuf {
        self.place(url).join(certificate_name(app))
    }

    /// Puts it in the old one's place.
    pub fn keep_certificate(&self, url: &str, app: &str, pem: &str) -> Result<()> {
        self.keep(url, &certificate_name(app), pem.as_bytes())
    }

    /// `None` where there is none that can be read: another is as good.
    pub fn account(&self, url: &str, email: Option<&str>) -> Option<AccountCredentials> {
        serde_json::from_slice(&std::fs::read(self.place(url).join(account_name(email))).ok()?).ok()
    }

    pub fn keep_account(&self, url: &str, email: Option<&str>, account: &AccountCredentials) -> Result<()> {
        let text = serde_json::to_vec(account).context("the account cannot be written")?;
        self.keep(url, &account_name(email), &text)
    }

    pub fn forget_account(&self, url: &str, email: Option<&str>) {
        let _ = std::fs::remove_file(self.place(url).join(account_name(email)));
    }

    fn keep(&self, url: &str, name: &str, contents: &[u8]) -> Result<()> {
        let directory = self.place(url);
        make_private_dir(&directory)?;
        files::replace(&directory, name, contents, Lasting::PowerCut).context(cannot_write(&directory, name))
    }
}

fn cannot_write(directory: &Path, name: &str) -> String {
    format!("cannot write {}", directory.join(name).display())
}

fn certificate_name(app: &str) -> String {
    format!("{app}.pem")
}

/// No app has a name with a dot in it.
fn account_name(email: Option<&str>) -> String {
    format!("account.{}.json", short_digest(email.unwrap_or_default()))
}

fn short_digest(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn each_authority_has_a_place_of_its_own_which_others_cannot_enter() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().to_path_buf());
        let url = "https://acme.example.com:14000/dir";
        store.keep_certificate(url, "shop", "key and chain").unwrap();
        let path = store.certificate(url, "shop");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "key and chain");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(mode(&root.path().join("acme")), 0o700);
        let place = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
        assert!(place.starts_with("acme.example.com-"), "{place}");
        assert_ne!(store.certificate("https://acme.example.com:14000/other", "shop"), path);
        // Whatever a URL has in it, it leads nowhere else.
        for url in ["https://../../etc", "https://a/../b", "https://%2e%2e", "https://..", "https://\u{0}"] {
            assert_eq!(store.place(url).parent(), Some(root.path().join("acme").as_path()), "{url}");
            assert!(store.place(url).file_name().is_some());
        }
        store.keep_certificate(url, "shop", "another").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "another");
    }

    #[test]
    fn an_account_is_for_one_authority_and_one_address() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path().to_path_buf());
        // The key of instant-acme's own tests.
        let account = r#"{"id":"https://a/1","key_pkcs8":"MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgJVWC_QzOTCS5vtsJp2IG-UDc8cdDfeoKtxSZxaznM-mhRANCAAQenCPoGgPFTdPJ7VLLKt56RxPlYT1wNXnHc54PEyBg3LxKaH0-sJkX0mL8LyPEdsfL_Oz4TxHkWLJGrXVtNhfH","directory":"https://a"}"#;
        let account = serde_json::from_str(account).unwrap();
        store.keep_account("https://a", Some("x@y"), &account).unwrap();
        assert!(store.account("https://a", Some("x@y")).is_some());
        assert!(
            store.account("https://a", None).is_none() && store.account("https://b", Some("x@y")).is_none()
        );
        store.forget_account("https://a", Some("x@y"));
        assert!(store.account("https://a", Some("x@y")).is_none());
    }
}
