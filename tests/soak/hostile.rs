//! Guests that attack, with ever new seeds. `make soak NAME=hostile MINUTES=120`; FLYRUN_SOAK_SEED repeats a run's choices.

use std::time::{Duration, Instant};

use tests::hostile::{ATTACKS, Attack};

use crate::setting;

#[test]
fn hostile_guests_of_many_seeds() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (minutes, first) = (setting("FLYRUN_SOAK_MINUTES", 20), setting("FLYRUN_SOAK_SEED", now));
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    let mut machines = 0;
    for seed in first.. {
        if Instant::now() >= until {
            break;
        }
        println!("hostile: seed {seed}");
        let attack = Attack { names: &ATTACKS, seed, percent: 50, cpus: 1, net: "user", console_file: false };
        attack.run();
        Attack { names: &["race", "chains", "resets"], cpus: 2, ..attack.clone() }.run();
        Attack { names: &["registers", "rings", "chains", "available", "frames"], net: "vhost", ..attack }
            .run();
        machines += 3;
    }
    println!("hostile: {machines} machines in {minutes} minutes, seeds from {first}");
}
