//! Bars on standard error while an image is fetched and unpacked; plain lines where that is no terminal.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock};

use images::{Digest, Event, Progress};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// All bars of one command. Nothing is drawn until there is something to tell.
pub struct Bars {
    terminal: bool,
    bars: OnceLock<MultiProgress>,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    pub fn on_stderr() -> Bars {
        let terminal = std::io::stderr().is_terminal();
        Bars { terminal, bars: OnceLock::new(), layers: Mutex::default() }
    }

    /// A bar for unpacking, in compressed bytes.
    pub fn unpacking(&self, bytes: u64) -> ProgressBar {
        self.say("unpacking");
        self.add("unpack", bytes)
    }

    fn add(&self, name: &str, bytes: u64) -> ProgressBar {
        let draw = || match self.terminal {
            true => MultiProgress::new(),
            false => MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
        };
        let style = ProgressStyle::with_template("{prefix:14} {bar:30} {bytes:>11} / {total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.get_or_init(draw).add(ProgressBar::new(bytes).with_style(style));
        bar.set_prefix(name.to_string());
        bar
    }

    /// A line, above the bars if there are any; where bars tell the same, only in their absence.
    fn say(&self, line: &str) {
        if !self.terminal {
            anstream::eprintln!("flyrun: {line}");
        }
    }

    fn warn(&self, line: &str) {
        match self.bars.get().filter(|_| self.terminal) {
            Some(bars) => {
                let _ = bars.println(format!("flyrun: {line}"));
            }
            None => anstream::eprintln!("flyrun: {line}"),
        }
    }

    fn layer(&self, digest: Digest, change: impl FnOnce(&ProgressBar)) {
        if let Ok(layers) = self.layers.lock()
            && let Some(bar) = layers.get(&digest)
        {
            change(bar);
        }
    }
}

impl Progress for Bars {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Resolving { name } => self.say(&format!("pulling {name}")),
            Event::LayerStarted { digest, size, resumed_from } => {
                let bar = self.add(&digest.short(), size);
                bar.set_position(resumed_from);
                if let Ok(mut layers) = self.layers.lock() {
                    layers.insert(digest, bar);
                }
            }
            Event::LayerProgress { digest, bytes } => self.layer(digest, |bar| bar.set_position(bytes)),
            Event::LayerDone { digest, .. } => self.layer(digest, ProgressBar::finish_and_clear),
            Event::Waiting { digest } => {
                self.warn(&format!("waiting for another flyrun that is at {}", digest.short()));
            }
            Event::Retrying { attempt, delay, error } => {
                self.warn(&format!("{error}; attempt {attempt} in {} s", delay.as_secs_f32()));
            }
            _ => {}
        }
    }
}
