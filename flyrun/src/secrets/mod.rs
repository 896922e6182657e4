//! Secrets of apps: encrypted files below the store's root, one for each app, which machines are given over vsock alone.
//!
//! No record of a machine has one: it names the app ([`crate::machine::Config::secrets`]), and the monitor reads the file when the
//! machine starts ([`crate::delivery`]). The pure parts are [`name`] and [`sealed`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;

use ring::hmac;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

pub mod key;
pub mod name;
pub mod sealed;

pub use name::{Name, Value};

use self::key::{Key, KeyFile, VARIABLE, hex};
use self::name::{MAX_APP_BYTES, MAX_SECRETS};
use self::sealed::Refused;
use crate::error::{Context, Error, Result};
use crate::files::{self, Lasting};
use crate::machine::{is_name, now};
use crate::paths::{Paths, make_private_dir};
use crate::random;

/// No file of secrets is longer: JSON may write a byte of a value as six.
const MAX_FILE_BYTES: u64 = 8 << 20;
/// Bytes of a digest that are shown.
const DIGEST_BYTES: usize = 8;

/// All apps' secrets.
#[derive(Clone, Debug)]
pub struct Secrets {
    directory: PathBuf,
    key: KeyFile,
}

/// One secret, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    value: Value,
    /// Seconds since the epoch.
    set_at: u64,
}

type Contents = BTreeMap<Name, Kept>;

/// What is told of a secret. The fields of `--json`; their names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    pub name: Name,
    /// Another value has another digest; nothing can be learnt from it without the key.
    pub digest: String,
    /// Seconds since the epoch.
    pub created_at: u64,
}

impl Secrets {
    /// Those of a store, with the key that `FLYRUN_SECRETS_KEY_FILE` names, or the store's own.
    pub fn new(paths: &Paths) -> Secrets {
        let named = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        Secrets { directory: paths.secrets(), key: KeyFile::new(&paths.root, named) }
    }

    /// Sets secrets of an app, and says how many of them are new or have another value than before.
    ///
    /// # Errors
    /// They are too many or too long, or the app's file cannot be read or written.
    pub fn set(&self, app: &str, secrets: Vec<(Name, Value)>) -> Result<usize> {
        check_app(app)?;
        let _lock = self.lock()?;
        let key = self.key.read_or_make(self.is_empty())?;
        let mut contents = self.load(app, &key)?.unwrap_or_default();
        let mut changed = 0;
        for (name, value) in secrets {
            if contents.get(&name).is_none_or(|kept| kept.value != value) {
                changed += 1;
                contents.insert(name, Kept { value, set_at: now() });
            }
        }
        check_size(&contents)?;
        if changed > 0 {
            self.store(app, &key, &contents)?;
        }
        Ok(changed)
    }

    /// Takes secrets from an app.
    ///
    /// # Errors
    /// It has not all of them; then it keeps them all. Or its file cannot be read or written.
    pub fn unset(&self, app: &str, names: &[Name]) -> Result<()> {
        check_app(app)?;
        let _lock = self.lock()?;
        let key = self.key.read_or_make(self.is_empty())?;
        let mut contents = self.load(app, &key)?.unwrap_or_default();
        for name in names {
            if contents.remove(name).is_none() {
                return Err(Error::new(format!("app '{app}' has no secret {name}"))
                    .advice(format!("`flyrun secrets list -a {app}` lists those it has.")));
            }
        }
        if contents.is_empty() {
            fs::remove_file(self.directory.join(app)).context("cannot remove the app's secrets")
        } else {
            self.store(app, &key, &contents)
        }
    }

    /// What an app has, by name.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub fn list(&self, app: &str) -> Result<Vec<Listed>> {
        let Some((key, contents)) = self.read_contents(app)? else { return Ok(vec![]) };
        let digests = hmac::Key::new(hmac::HMAC_SHA256, &*key.derive("flyrun secrets: digest"));
        let list = contents.iter().map(|(name, kept)| Listed {
            name: name.clone(),
            digest: digest(&digests, app, name, &kept.value),
            created_at: kept.set_at,
        });
        Ok(list.collect())
    }

    /// What an app has, for one of its machines. An app without a file has none.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub fn read(&self, app: &str) -> Result<BTreeMap<Name, Value>> {
        let contents = self.read_contents(app)?.map(|(_, contents)| contents).unwrap_or_default();
        Ok(contents.into_iter().map(|(name, kept)| (name, kept.value)).collect())
    }

    fn read_contents(&self, app: &str) -> Result<Option<(Key, Contents)>> {
        check_app(app)?;
        if !self.directory.join(app).exists() {
            return Ok(None);
        }
        let key = self.key.read()?;
        Ok(self.load(app, &key)?.map(|contents| (key, contents)))
    }

    fn load(&self, app: &str, key: &Key) -> Result<Option<Contents>> {
        let path = self.directory.join(app);
        let told = || format!("cannot read the secrets of app '{app}', {}", path.display());
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.context(told())?,
        };
        let opened = sealed::open(key, app, &bytes).and_then(|text| {
            // The parser's own message could quote what it reads.
            serde_json::from_slice(&text).map_err(|_| Refused::Damaged)
        });
        opened.map(Some).map_err(|refused| {
            let advice = match refused {
                Refused::AnotherKey => {
                    format!("Name the file with the key it was encrypted with in {VARIABLE}.")
                }
                Refused::Version(_) => "Use the flyrun that wrote it.".to_string(),
                _ => "Bring it back from a backup, or remove it and set the secrets again.".to_string(),
            };
            Error::caused(told(), &refused).advice(advice)
        })
    }

    fn store(&self, app: &str, key: &Key, contents: &Contents) -> Result<()> {
        let told = || format!("cannot write the secrets of app '{app}'");
        let text = Zeroizing::new(serde_json::to_vec(contents).context(told())?);
        let mut nonce = [0; 12];
        random::fill(&mut nonce)?;
        let file = sealed::seal(key, app, nonce, &text).context(told())?;
        files::replace(&self.directory, app, &file, Lasting::PowerCut).context(told())
    }

    fn lock(&self) -> Result<File> {
        make_private_dir(&self.directory)?;
        let path = self.directory.join(".lock");
        let file = files::open_lock(&path).context(format!("cannot open the lock {}", path.display()))?;
        file.lock().context("cannot lock the secrets")?;
        Ok(file)
    }

    /// Whether no app has any: then a key may be made.
    fn is_empty(&self) -> bool {
        let names = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        !names.filter_map(|entry| entry.file_name().into_string().ok()).any(|name| is_name(&name))
    }
}

/// Whether an app can be called so.
///
/// # Errors
/// It cannot.
pub fn check_app(app: &str) -> Result<()> {
    if is_name(app) {
        return Ok(());
    }
    Err(Error::new(format!("{app:?} cannot be an app's name"))
        .advice("Give the name that `app` has in its fly.toml."))
}

fn check_size(contents: &Contents) -> Result<()> {
    let bytes: usize =
        contents.iter().map(|(name, kept)| name.as_str().len() + kept.value.expose().len()).sum();
    if contents.len() > MAX_SECRETS || bytes > MAX_APP_BYTES {
        let told = format!("an app cannot have {} secrets with {bytes} bytes", contents.len());
        return Err(Error::new(told).advice(format!(
            "{MAX_SECRETS} secrets with {} KiB together is the most.",
            MAX_APP_BYTES >> 10
        )));
    }
    Ok(())
}

/// Equal values of two apps, or of two names, do not show.
fn digest(key: &hmac::Key, app: &str, name: &Name, value: &Value) -> String {
    let mut context = hmac::Context::with_key(key);
    for part in [app, name.as_str(), value.expose()] {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part.as_bytes());
    }
    hex(context.sign().as_ref().get(..DIGEST_BYTES).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> (tempfile::TempDir, Secrets) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        let secrets = Secrets { directory: root.join("secrets"), key: KeyFile::new(&root, None) };
        (directory, secrets)
    }

    fn pair(name: &str, value: &str) -> (Name, Value) {
        let name = Name::new(name).unwrap();
        (name.clone(), Value::new(&name, Zeroizing::new(value.into())).unwrap())
    }

    fn digests(secrets: &Secrets, app: &str) -> Vec<(String, String)> {
        let list = secrets.list(app).unwrap();
        list.into_iter().map(|listed| (listed.name.to_string(), listed.digest)).collect()
    }

    #[test]
    fn secrets_are_set_read_listed_and_unset() {
        let (_directory, secrets) = secrets();
        assert!(secrets.list("shop").unwrap().is_empty() && secrets.read("shop").unwrap().is_empty());
        assert_eq!(secrets.set("shop", vec![pair("B", "2"), pair("A", "1")]).unwrap(), 2);
        assert_eq!(secrets.set("shop", vec![pair("B", "2"), pair("A", "3")]).unwrap(), 1);
        let read = secrets.read("shop").unwrap();
        let read: Vec<_> = read.iter().map(|(name, value)| (name.as_str(), value.expose())).collect();
        assert_eq!(read, [("A", "3"), ("B", "2")]);
        assert!(secrets.read("blog").unwrap().is_empty());
        let a = Name::new("A").unwrap();
        let told = secrets.unset("shop", &[a.clone(), Name::new("C").unwrap()]).unwrap_err().to_string();
        assert!(told.contains("no secret C"), "{told}");
        assert_eq!(secrets.list("shop").unwrap().len(), 2);
        secrets.unset("shop", &[a, Name::new("B").unwrap()]).unwrap();
        assert!(!secrets.directory.join("shop").exists());
    }

    #[test]
    fn a_digest_changes_with_the_value_and_is_no_other_s() {
        let (_directory, secrets) = secrets();
        secrets.set("shop", vec![pair("A", "1"), pair("B", "1")]).unwrap();
        secrets.set("blog", vec![pair("A", "1")]).unwrap();
        let before = digests(&secrets, "shop");
        assert_ne!(before[0].1, before[1].1);
        assert_ne!(before[0].1, digests(&secrets, "blog")[0].1);
        secrets.set("shop", vec![pair("A", "2")]).unwrap();
        let after = digests(&secrets, "shop");
        assert!(after[0].1 != before[0].1 && after[1] == before[1] && after[0].1.len() == 16);
    }

    #[test]
    fn files_are_their_owner_s_and_have_no_value_in_them() {
        use std::os::unix::fs::MetadataExt;
        let (_directory, secrets) = secrets();
        secrets.set("shop", vec![pair("TOKEN", "hunter2-hunter2")]).unwrap();
        let path = secrets.directory.join("shop");
        let text = fs::read(&path).unwrap();
        for word in [&b"hunter2"[..], b"TOKEN"] {
            assert!(!text.windows(word.len()).any(|window| window == word));
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o077, 0);
        assert_eq!(fs::metadata(&secrets.directory).unwrap().mode() & 0o077, 0);
    }

    #[test]
    fn one_app_s_file_is_not_another_s_and_a_changed_one_is_refused() {
        let (_directory, secrets) = secrets();
        secrets.set("shop", vec![pair("A", "1")]).unwrap();
        let shop = secrets.directory.join("shop");
        fs::copy(&shop, secrets.directory.join("blog")).unwrap();
        let told = |app: &str| secrets.read(app).unwrap_err().to_string();
        assert!(told("blog").contains("damaged"));
        let whole = fs::read(&shop).unwrap();
        fs::write(&shop, &whole[..20]).unwrap();
        assert!(told("shop").contains("truncated") && told("shop").contains("backup"), "{}", told("shop"));
        fs::write(&shop, &whole).unwrap();
        let other =
            Secrets { key: KeyFile::new(&secrets.directory.join("elsewhere"), None), ..secrets.clone() };
        other.key.read_or_make(true).unwrap();
        let told = other.read("shop").unwrap_err().to_string();
        assert!(told.contains("another key") && told.contains(VARIABLE), "{told}");
        // Nor is anything written with it.
        assert!(other.set("shop", vec![pair("A", "2")]).is_err() && secrets.read("shop").is_ok());
    }

    #[test]
    fn a_lost_key_is_not_made_anew_as_long_as_there_are_secrets() {
        let (_directory, secrets) = secrets();
        secrets.set("shop", vec![pair("A", "1")]).unwrap();
        fs::remove_file(secrets.directory.with_file_name("secrets.key")).unwrap();
        for result in [secrets.set("blog", vec![pair("A", "1")]).map(drop), secrets.read("shop").map(drop)] {
            assert!(result.unwrap_err().to_string().contains("is not there"));
        }
    }

    #[test]
    fn an_app_has_so_many_secrets_and_no_more() {
        let (_directory, secrets) = secrets();
        let long = "x".repeat(name::MAX_VALUE_BYTES);
        let most = MAX_APP_BYTES / name::MAX_VALUE_BYTES;
        let many: Vec<_> = (0..most).map(|index| pair(&format!("A{index}"), &long)).collect();
        assert!(secrets.set("shop", many).unwrap_err().to_string().contains("512 KiB"));
        for app in ["../x", "", ".lock", "a/b"] {
            assert!(secrets.set(app, vec![pair("A", "1")]).is_err(), "{app}");
        }
    }
}
