//! What follows the files of apps, and what is said of them beside: changes of files, SIGHUP, `flyrun deploy`, `flyrun scale`. One at
//! a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use app::config::model::Strategy;
use app::config::{MAX_MACHINES, together};
use images::PullPolicy;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::choices::Choices;
use super::control::{self, Ask, Deploy, Job, Scale, Step, Tell};
use super::deploy::{How, Old};
use super::engine::{Engine, Prepared};
use super::front::Front;
use super::host::Host;
use super::log::Log;
use super::reload::Changes;
use super::template::Templates;
use super::{release, template};
use crate::apps::{AppFile, judge, load, read, told};
use crate::cli::MIN_MEMORY_MIB;
use crate::error::{Context as _, Error, Result};
use crate::files;
use crate::paths::Paths;

/// What follows the files.
pub struct Serving {
    engine: Arc<Engine>,
    front: Front,
    /// One for each app, by name: an app has one who starts its machines.
    locks: Arc<Mutex<Vec<(String, File)>>>,
    log: Log,
    path: PathBuf,
    /// The apps as they are served.
    current: Vec<Wish>,
    /// Versions that have failed: they are not tried again until they change, or somebody asks for them.
    failed: Vec<Wish>,
}

/// An app as it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wish {
    file: AppFile,
    counts: BTreeMap<String, u32>,
}

/// What is to be done, and for whom.
struct Task<'t> {
    /// The app that somebody asks for, and how it is to be deployed. Others follow their files.
    asked: Option<(&'t str, How)>,
    tell: &'t Tell,
}

/// What came of it.
#[derive(Default)]
struct Followed {
    old: Vec<Old>,
    deployed: BTreeSet<String>,
    failed: BTreeMap<String, Error>,
}

impl Wish {
    fn of(paths: &Paths, file: AppFile) -> Result<Wish> {
        let choices = Choices::read(paths, &file.app.name)?;
        Ok(Wish { file: choices.apply(file), counts: choices.counts })
    }

    fn name(&self) -> &str {
        &self.file.app.name
    }
}

impl Serving {
    pub fn new(
        engine: Arc<Engine>,
        front: Front,
        locks: Arc<Mutex<Vec<(String, File)>>>,
        log: Log,
        path: PathBuf,
    ) -> Serving {
        Serving { engine, front, locks, log, path, current: Vec::new(), failed: Vec::new() }
    }

    fn host(&self) -> Arc<Host> {
        self.engine.shared().host.clone()
    }

    /// Serves what these files say, from nothing.
    ///
    /// # Errors
    /// An app cannot be served. None is then.
    pub async fn begin(&mut self, files: Vec<AppFile>) -> Result<()> {
        let host = self.host();
        let wishes = files.into_iter().map(|file| Wish::of(&host.context.paths, file));
        let wishes = wishes.collect::<Result<Vec<_>>>()?;
        self.follow(wishes, Task { asked: None, tell: &Tell::nobody() }).await.map(drop)
    }

    /// Serves what the files say now. What fails changes nothing of its app, but for images that are there now.
    async fn reload(&mut self, again: bool) -> Result<()> {
        let files = match load(&self.path) {
            Ok(files) => files,
            Err(refused) => {
                self.log.line("files refused").with("why", told(&refused).to_string()).end();
                return Ok(());
            }
        };
        if again {
            self.failed.clear();
        }
        let host = self.host();
        let mut wishes = Vec::new();
        for file in files {
            let wish = Wish::of(&host.context.paths, file)?;
            let current = self.current.iter().find(|current| current.name() == wish.name());
            let is_failed = self.failed.contains(&wish);
            wishes.push(current.filter(|_| is_failed).cloned().unwrap_or(wish));
        }
        let followed = self.follow(wishes, Task { asked: None, tell: &Tell::nobody() }).await?;
        for error in followed.failed.values() {
            self.log.line("deploy failed").with("why", error.to_string()).end();
        }
        self.log.line("files followed").end();
        let engine = self.engine.clone();
        tokio::spawn(async move {
            for old in followed.old {
                engine.drained(old, &Tell::nobody()).await;
            }
        });
        Ok(())
    }

    /// `flyrun deploy`.
    async fn deploy(&mut self, wanted: Deploy, tell: Tell) -> std::result::Result<(), (Error, Tell)> {
        match self.deploy_with(&wanted, &tell).await {
            Ok(followed) => {
                let done = self.done(&wanted.app, followed.deployed.contains(&wanted.app));
                let engine = self.engine.clone();
                tokio::spawn(async move {
                    for old in followed.old {
                        engine.drained(old, &tell).await;
                    }
                    tell.step(done);
                });
                Ok(())
            }
            Err(error) => Err((error, tell)),
        }
    }

    async fn deploy_with(&mut self, wanted: &Deploy, tell: &Tell) -> Result<Followed> {
        let name = wanted.app.as_str();
        let served = self.served(name)?;
        let path = PathBuf::from(&served.file.name);
        let text = match &wanted.file {
            Some((_, text)) => text.clone().into_bytes(),
            None => read(&path).map_err(|refused| told(&refused))?,
        };
        let file = judge(&path, &text).map_err(|refused| told(&refused))?;
        if file.app.name != name {
            let told = format!("{}: it is the file of the app {}, not of {name}", file.name, file.app.name);
            return Err(Error::new(told));
        }
        let paths = self.host().context.paths.clone();
        let mut choices = Choices::read(&paths, name)?;
        choices.choose_image(&file, wanted.image.as_deref());
        let mut how = How::of(&file.app);
        how.strategy = match wanted.strategy {
            Some(control::Strategy::Rolling) => Strategy::Rolling,
            Some(control::Strategy::Bluegreen) => Strategy::Bluegreen,
            None => how.strategy,
        };
        how.wait = wanted.wait_timeout_ms.map_or(how.wait, Duration::from_millis);
        if how.strategy == Strategy::Bluegreen
            && file.app.groups.values().any(|group| !group.mounts.is_empty())
        {
            return Err(Error::new(format!(
                "app {name}: bluegreen runs the new machines beside the old ones, and a volume can be in one machine"
            ))
            .advice("Use --strategy rolling."));
        }
        let wish = Wish { file: choices.apply(file), counts: choices.counts.clone() };
        tell.step(Step::Preparing { image: wish.file.app.image.clone() });
        let mut followed = self.follow(self.with(wish)?, Task { asked: Some((name, how)), tell }).await?;
        if let Some(error) = followed.failed.remove(name) {
            return Err(error);
        }
        choices.write(&paths, name)?;
        if wanted.file.is_some() {
            install(&path, &text)?;
        }
        Ok(followed)
    }

    /// `flyrun scale count`.
    async fn scale(&mut self, wanted: &Scale) -> Result<Step> {
        let name = wanted.app.as_str();
        let mut wish = self.served(name)?.clone();
        let paths = self.host().context.paths.clone();
        let mut choices = Choices::read(&paths, name)?;
        for (group, count) in &wanted.counts {
            let group = group_of(&wish, group)?;
            if *count > MAX_MACHINES {
                return Err(Error::new(format!("{count} machines are too many"))
                    .advice(format!("A group has {MAX_MACHINES} at most.")));
            }
            let mounts = &wish.file.app.groups.get(&group).map_or(0, |group| group.mounts.len());
            if *count > 1 && *mounts > 0 {
                return Err(Error::new(format!(
                    "the machine of group '{group}' has a volume, which one machine can have"
                ))
                .advice("Leave its count at 1, or [[mounts]] away."));
            }
            choices.counts.insert(group, *count);
        }
        wish.counts.clone_from(&choices.counts);
        self.follow(self.with(wish)?, Task { asked: None, tell: &Tell::nobody() }).await?;
        choices.write(&paths, name)?;
        for (group, count) in &choices.counts {
            self.log
                .line("scaled")
                .with("app", name)
                .with("group", group.as_str())
                .with("count", *count)
                .end();
        }
        Ok(self.done(name, true))
    }

    /// All apps as they are, but for this one.
    fn with(&self, wish: Wish) -> Result<Vec<Wish>> {
        let mut wishes = self.current.clone();
        wishes.iter_mut().filter(|other| other.name() == wish.name()).for_each(|other| *other = wish.clone());
        let files: Vec<_> = wishes.iter().map(|wish| wish.file.clone()).collect();
        together(&files).map_err(|refused| told(&refused))?;
        Ok(wishes)
    }

    fn served(&self, app: &str) -> Result<&Wish> {
        let served = self.current.iter().find(|wish| wish.name() == app);
        served.ok_or_else(|| {
            Error::new(format!("no app '{}' is served by this flyrun serve", app.escape_debug()))
                .advice(format!("It serves what is in {}.", self.path.display()))
        })
    }

    fn done(&self, app: &str, changed: bool) -> Step {
        let views = self.engine.views().into_iter().filter(|view| view.app == app && !view.is_leaving);
        let versions = views.map(|view| (view.group, view.version)).collect();
        Step::Done { app: app.to_string(), versions, changed }
    }

    /// Serves these apps. A version that fails leaves its app as it was.
    async fn follow(&mut self, mut wishes: Vec<Wish>, task: Task<'_>) -> Result<Followed> {
        let host = self.host();
        let mut locks = Vec::new();
        for wish in wishes.iter().filter(|wish| !self.has_lock(wish.name())) {
            locks.push((wish.name().to_string(), lock(&host, wish.name())?));
        }
        // Before anything that takes its time.
        let mut changed = self.front.prepare(&files(&wishes))?;
        let asked = task.asked.map(|(app, _)| app);
        let mut prepared = prepare_all(&host, wishes.clone(), asked, true).await?;
        let followed = self.deploy_changed(&prepared, &task).await;
        if !followed.failed.is_empty() {
            for wish in &mut wishes {
                let current = self.current.iter().find(|current| current.name() == wish.name());
                if let Some(current) = current.filter(|_| followed.failed.contains_key(wish.name())) {
                    self.failed.retain(|failed| failed.name() != wish.name());
                    self.failed.push(std::mem::replace(wish, current.clone()));
                }
            }
            drop(changed);
            changed = self.front.prepare(&files(&wishes))?;
            prepared = prepare_all(&host, wishes.clone(), None, false).await?;
        }
        let engine = self.engine.clone();
        let runtime = tokio::runtime::Handle::current();
        spawn_blocking(move || {
            let _runtime = runtime.enter();
            engine.serve(prepared)
        })
        .await
        .context("the files were not followed")??;
        self.front.follow(changed).await?;
        self.locks().extend(locks);
        self.failed.retain(|failed| !wishes.contains(failed));
        self.current = wishes;
        Ok(followed)
    }

    async fn deploy_changed(&self, prepared: &[Prepared], task: &Task<'_>) -> Followed {
        let mut followed = Followed::default();
        for prepared in prepared.iter().filter(|prepared| self.engine.is_changed(prepared)) {
            let name = &prepared.app.name;
            let nobody = Tell::nobody();
            let (how, tell) = match task.asked {
                Some((asked, how)) if asked == name => (how, task.tell),
                _ => (How::of(&prepared.app), &nobody),
            };
            match self.engine.deploy(prepared, how, tell).await {
                Ok(old) => {
                    followed.old.push(old);
                    followed.deployed.insert(name.clone());
                }
                Err(error) => _ = followed.failed.insert(name.clone(), error),
            }
        }
        followed
    }

    fn locks(&self) -> MutexGuard<'_, Vec<(String, File)>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_lock(&self, app: &str) -> bool {
        self.locks().iter().any(|(name, _)| name == app)
    }
}

fn files(wishes: &[Wish]) -> Vec<AppFile> {
    wishes.iter().map(|wish| wish.file.clone()).collect()
}

/// The group that is meant; an app with one needs no name of it.
fn group_of(wish: &Wish, name: &str) -> Result<String> {
    let groups = &wish.file.app.groups;
    let mut names = groups.keys();
    match (names.next(), names.next()) {
        (Some(only), None) if name.is_empty() => return Ok(only.clone()),
        _ if groups.contains_key(name) => return Ok(name.to_string()),
        _ => {}
    }
    let known: Vec<_> = groups.keys().map(|name| format!("{name}=N")).collect();
    let told = match name {
        "" => format!("app {} has several groups of machines", wish.name()),
        name => format!("app {} has no group '{}'", wish.name(), name.escape_debug()),
    };
    Err(Error::new(told).advice(format!("`flyrun scale count -a {} {}`", wish.name(), known.join(" "))))
}

/// Puts a text in a file's place, which stays whose it is.
fn install(path: &Path, text: &[u8]) -> Result<()> {
    let told = || format!("deployed, but {} is not what was deployed: cannot write it", path.display());
    let path = fs::canonicalize(path).context(told())?;
    if fs::read(&path).is_ok_and(|known| known == text) {
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // No *.toml, so that nobody takes it for an app's.
    let draft = path.with_file_name(format!(".{name}.new"));
    let write = || {
        fs::write(&draft, text)?;
        fs::set_permissions(&draft, fs::metadata(&path)?.permissions())?;
        File::open(&draft)?.sync_all()?;
        fs::rename(&draft, &path)
    };
    write().context(told())
}

/// Of the app that somebody asks for, a tag may have moved.
async fn prepare_all(
    host: &Arc<Host>,
    wishes: Vec<Wish>,
    asked: Option<&str>,
    releases: bool,
) -> Result<Vec<Prepared>> {
    let (host, asked) = (host.clone(), asked.map(str::to_string));
    let prepared = spawn_blocking(move || prepare(&host, wishes, asked.as_deref(), releases));
    prepared.await.context("the files were not followed")?
}

fn prepare(host: &Host, wishes: Vec<Wish>, asked: Option<&str>, releases: bool) -> Result<Vec<Prepared>> {
    let mut prepared = Vec::new();
    for Wish { file, counts } in wishes {
        let is_asked = asked == Some(&*file.app.name);
        let policy = if is_asked { PullPolicy::Always } else { PullPolicy::Missing };
        let Templates { groups, release } = template::of_app(host, &file, policy)?;
        if let Some(small) = groups.values().find(|template| template.memory_mib() < MIN_MEMORY_MIB) {
            let told =
                format!("app {}: {} MiB are too little for a machine", file.app.name, small.memory_mib());
            return Err(Error::new(told).advice(format!("Give it {MIN_MEMORY_MIB} or more in [[vm]].")));
        }
        prepared.push((Prepared { app: file.app, templates: groups, counts }, release));
    }
    // When nothing else can be wrong.
    for (Prepared { app, .. }, release) in prepared.iter().filter(|_| releases) {
        if let Some(release) = release {
            release::run(host, release, app.deploy.release_command_timeout)?;
        }
    }
    Ok(prepared.into_iter().map(|(prepared, _)| prepared).collect())
}

/// An app has one who starts its machines.
fn lock(host: &Host, app: &str) -> Result<File> {
    let path = host.context.paths.run.join(format!("app-{app}.lock"));
    let lock = files::open_lock(&path).context(format!("cannot open the lock {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(_) => Err(Error::new(format!("app {app} is served already, by another flyrun serve"))
            .advice("`flyrun status` tells by which process.")),
    }
}

/// Follows the files when they change, or when it is told to, and does what else is asked for.
pub async fn keep_following(mut serving: Serving, mut jobs: mpsc::Receiver<Job>, is_busy: Arc<AtomicBool>) {
    let (changed, mut changes) = mpsc::channel(1);
    let (hung_up, mut hangups) = mpsc::channel(1);
    tokio::spawn(tell_hangups(hung_up));
    tokio::spawn(tell_changes(changed, serving.path.clone(), serving.log.clone()));
    loop {
        is_busy.store(false, Ordering::Relaxed);
        let (job, again) = tokio::select! {
            Some(job) = jobs.recv() => (Some(job), false),
            Some(()) = hangups.recv() => (None, true),
            Some(()) = changes.recv() => (None, false),
            else => return,
        };
        is_busy.store(true, Ordering::Relaxed);
        match job {
            Some(job) => serving.does(job).await,
            None => {
                if let Err(error) = serving.reload(again).await {
                    serving.log.line("files not followed").with("why", error.to_string()).end();
                }
            }
        }
    }
}

impl Serving {
    async fn does(&mut self, Job { ask, tell }: Job) {
        let (error, tell) = match ask {
            Ask::Deploy(wanted) => match self.deploy(wanted, tell).await {
                Ok(()) => return,
                Err(failed) => failed,
            },
            Ask::Scale(wanted) => match self.scale(&wanted).await {
                Ok(done) => return tell.step(done),
                Err(error) => (error, tell),
            },
        };
        self.log.line("not done").with("why", error.to_string()).end();
        tell.step(Step::Failed { why: error.to_string() });
    }
}

async fn tell_hangups(changed: mpsc::Sender<()>) {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        // If one is to be followed already, that will do.
        let _ = changed.try_send(());
    }
}

async fn tell_changes(changed: mpsc::Sender<()>, path: PathBuf, log: Log) {
    match Changes::watch(&path) {
        Ok(mut changes) => loop {
            changes.next().await;
            let _ = changed.try_send(());
        },
        Err(error) => {
            log.line("changes of files are not noticed, only SIGHUP").with("why", error.to_string()).end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn wish(groups: &str) -> Wish {
        let text = format!("app = 'web'\nbuild.image = 'x'\n{groups}");
        let file = app::config::read("fly.toml", text.as_bytes()).unwrap();
        Wish { file, counts: BTreeMap::new() }
    }

    #[test]
    fn a_group_is_named_where_there_are_several() {
        let one = wish("");
        assert_eq!(group_of(&one, "").unwrap(), "app");
        assert_eq!(group_of(&one, "app").unwrap(), "app");
        let two = wish("processes = { web = '', worker = '' }");
        assert_eq!(group_of(&two, "worker").unwrap(), "worker");
        for (name, told) in [("", "several groups"), ("job", "no group 'job'")] {
            let error = group_of(&two, name).unwrap_err().to_string();
            assert!(error.contains(told) && error.contains("web=N worker=N"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_deployed_stays_whose_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real.toml"), directory.path().join("fly.toml"));
        fs::write(&real, "old").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        install(&link, b"new").unwrap();
        assert_eq!(fs::read(&real).unwrap(), b"new");
        assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "no draft is left");
        let error = install(&directory.path().join("none"), b"new").unwrap_err().to_string();
        assert!(error.starts_with("deployed, but "), "{error}");
    }
}
