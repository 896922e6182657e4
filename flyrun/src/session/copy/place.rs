//! What the destination of a copy means, by docker's rules. Pure.

use crate::error::{Error, Result};

/// Where a copy goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A directory that exists.
    pub directory: String,
    /// The name that the thing gets in it; `None` puts a directory's content there.
    pub name: Option<String>,
}

/// What there is already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    Directory,
    Other,
}

impl Place {
    /// Where `source` goes when the user says `destination` and there is `found`.
    ///
    /// # Errors
    /// A directory would replace a file, or a file is to go into a directory that does not exist.
    pub fn decide(source: &str, is_directory: bool, destination: &str, found: Found) -> Result<Place> {
        let own_name = last_name(source);
        let content_only = is_directory && (source.ends_with("/.") || source == "." || own_name.is_none());
        match found {
            Found::Directory => Ok(Place {
                directory: destination.to_string(),
                name: if content_only { None } else { own_name.map(String::from) },
            }),
            Found::Other if is_directory || destination.ends_with('/') => {
                Err(Error::new(format!("'{destination}' is there and not a directory"))
                    .advice("Name a directory, or a path where nothing is."))
            }
            Found::Nothing if !is_directory && destination.ends_with('/') => {
                Err(Error::new(format!("the directory '{destination}' does not exist"))
                    .advice("Make it first, or leave the slash at the end away."))
            }
            Found::Nothing | Found::Other => {
                let trimmed = destination.trim_end_matches('/');
                let name = last_name(trimmed)
                    .ok_or_else(|| Error::new(format!("'{destination}' is no name for a file")))?;
                let above = trimmed.strip_suffix(name).unwrap_or_default();
                let directory = if above.is_empty() { "." } else { above };
                Ok(Place { directory: directory.to_string(), name: Some(name.to_string()) })
            }
        }
    }
}

/// The last part of a path that is a name.
fn last_name(path: &str) -> Option<&str> {
    let name = path.trim_end_matches("/.").trim_end_matches('/').rsplit('/').next()?;
    (!matches!(name, "" | "." | "..")).then_some(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(source: &str, is_directory: bool, destination: &str, found: Found) -> Option<(String, String)> {
        let place = Place::decide(source, is_directory, destination, found).ok()?;
        Some((place.directory, place.name.unwrap_or_else(|| "(content)".into())))
    }

    fn goes_to(directory: &str, name: &str) -> Option<(String, String)> {
        Some((directory.into(), name.into()))
    }

    #[test]
    fn a_file_goes_into_a_directory_or_takes_the_name() {
        use Found::{Directory, Nothing, Other};
        assert_eq!(place("/etc/hosts", false, "/tmp", Directory), goes_to("/tmp", "hosts"));
        assert_eq!(place("/etc/hosts", false, "/tmp/h", Nothing), goes_to("/tmp/", "h"));
        assert_eq!(place("/etc/hosts", false, "/tmp/h", Other), goes_to("/tmp/", "h"));
        assert_eq!(place("hosts", false, "h", Nothing), goes_to(".", "h"));
        assert_eq!(place("hosts", false, "/h", Nothing), goes_to("/", "h"));
        assert_eq!(place("/etc/hosts", false, "/tmp/h/", Nothing), None);
        assert_eq!(place("/etc/hosts", false, "/tmp/h/", Other), None);
        assert_eq!(place("/etc/hosts", false, "..", Directory), goes_to("..", "hosts"));
    }

    #[test]
    fn a_directory_goes_into_a_directory_or_takes_the_name_or_gives_its_content() {
        use Found::{Directory, Nothing, Other};
        assert_eq!(place("/srv/app", true, "/tmp", Directory), goes_to("/tmp", "app"));
        assert_eq!(place("/srv/app/", true, "/tmp", Directory), goes_to("/tmp", "app"));
        assert_eq!(place("/srv/app/.", true, "/tmp", Directory), goes_to("/tmp", "(content)"));
        assert_eq!(place(".", true, "/tmp", Directory), goes_to("/tmp", "(content)"));
        assert_eq!(place("/", true, "/tmp", Directory), goes_to("/tmp", "(content)"));
        assert_eq!(place("/srv/app", true, "/tmp/new", Nothing), goes_to("/tmp/", "new"));
        assert_eq!(place("/srv/app/.", true, "/tmp/new/", Nothing), goes_to("/tmp/", "new"));
        assert_eq!(place("/srv/app", true, "/tmp/file", Other), None);
    }

    proptest! {
        #[test]
        fn a_name_is_one_name(source in "[a./]{0,8}", destination in "[a./]{0,8}", is_directory: bool) {
            for found in [Found::Nothing, Found::Directory, Found::Other] {
                if let Ok(Place { name: Some(name), .. }) = Place::decide(&source, is_directory, &destination, found) {
                    prop_assert!(!name.contains('/') && !matches!(name.as_str(), "" | "." | ".."));
                }
            }
        }
    }
}
