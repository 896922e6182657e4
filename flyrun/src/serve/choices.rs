//! What `flyrun deploy --image` and `flyrun scale` have said of an app: a small file below the root, so that the next
//! `flyrun serve` goes by it too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::apps::AppFile;
use crate::error::{Context as _, Error, Result};
use crate::files::{self, Lasting};
use crate::paths::{Paths, make_private_dir};

/// What was said of an app beside its file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choices {
    /// Another image than the file's.
    pub image: Option<Image>,
    /// How many machines a group has.
    #[serde(default)]
    pub counts: BTreeMap<String, u32>,
}

/// An image in the place of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What the file says. When it says something else, that counts.
    pub of: String,
    pub used: String,
}

impl Choices {
    /// Of an app that nothing was said of there are none.
    ///
    /// # Errors
    /// The file cannot be read, or is broken.
    pub fn read(paths: &Paths, app: &str) -> Result<Choices> {
        let path = paths.apps().join(name(app));
        let told = format!("cannot read {}", path.display());
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                Error::caused(told, &error)
                    .advice("Remove it, and say anew what was said by `flyrun scale` and `deploy --image`.")
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Choices::default()),
            Err(error) => Err(Error::caused(told, &error)),
        }
    }

    /// Keeps them.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, paths: &Paths, app: &str) -> Result<()> {
        let directory = paths.apps();
        make_private_dir(&directory)?;
        let bytes = serde_json::to_vec(self).context("cannot write JSON")?;
        files::replace(&directory, &name(app), &bytes, Lasting::PowerCut)
            .context(format!("cannot write below {}", directory.display()))
    }

    /// Another image from now on; the file's own if there is none.
    pub fn choose_image(&mut self, file: &AppFile, image: Option<&str>) {
        let of = file.app.image.clone();
        self.image = image.filter(|image| **image != of).map(|used| Image { of, used: used.to_string() });
    }

    /// The file with what was said beside it.
    pub fn apply(&self, mut file: AppFile) -> AppFile {
        if let Some(image) = self.image.as_ref().filter(|image| image.of == file.app.image) {
            file.app.image.clone_from(&image.used);
        }
        file
    }
}

fn name(app: &str) -> String {
    format!("{app}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(image: &str) -> AppFile {
        app::config::read("fly.toml", format!("app = 'web'\nbuild.image = '{image}'").as_bytes()).unwrap()
    }

    #[test]
    fn another_image_counts_until_the_file_names_another() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths { root: directory.path().join("root"), run: directory.path().join("run") };
        let mut choices = Choices::read(&paths, "web").unwrap();
        assert_eq!(choices, Choices::default());
        choices.choose_image(&file("web:1"), Some("web:2"));
        choices.counts.insert("app".to_string(), 3);
        choices.write(&paths, "web").unwrap();
        let choices = Choices::read(&paths, "web").unwrap();
        assert_eq!(choices.apply(file("web:1")).app.image, "web:2");
        assert_eq!(choices.apply(file("web:3")).app.image, "web:3");
        assert_eq!(choices.counts["app"], 3);
        std::fs::write(paths.apps().join("web.json"), "{").unwrap();
        let error = Choices::read(&paths, "web").unwrap_err().to_string();
        assert!(error.contains("web.json") && error.contains("Remove it"), "{error}");
    }
}
