//! Which keys there are: the one list that reading, messages and the table in README.md go by.

/// A table of fly.toml.
#[derive(Debug)]
pub struct Section {
    /// As a file has it: `[http_service.concurrency]`. Empty for the top level.
    pub header: &'static str,
    /// What it may have.
    pub keys: &'static [Key],
    /// What Fly.io knows and flyrun does not: the name, and what to do instead.
    pub(crate) foreign: &'static [(&'static str, &'static str)],
}

/// A key of a table.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What holds without it, as it would be written; or a word.
    pub default: &'static str,
}

const fn key(name: &'static str, default: &'static str) -> Key {
    Key { name, default }
}

const PROCESSES_APP: Key = key("processes", "`app`, or the first group");
const PROCESSES_ALL: Key = key("processes", "all groups");
const REQUIRED: &str = "required";
const NONE: &str = "none";

pub(crate) static TOP: Section = Section {
    header: "",
    keys: &[
        key("app", REQUIRED),
        key("primary_region", r#""local""#),
        key("kill_signal", r#""SIGINT""#),
        key("kill_timeout", r#""5s""#),
        key("build", REQUIRED),
        key("deploy", NONE),
        key("env", NONE),
        key("processes", "one group, `app`"),
        key("http_service", NONE),
        key("services", NONE),
        key("checks", NONE),
        key("vm", "one CPU, 256mb"),
        key("mounts", NONE),
        key("files", NONE),
        key("restart", "on-failure"),
        key("metrics", NONE),
        key("flyrun", NONE),
    ],
    foreign: &[
        ("mount", "Write [[mounts]]."),
        ("metric", "Write [[metrics]]."),
        ("compute", "Write [[vm]]."),
        ("swap_size_mb", "Machines have no swap: give [[vm]] more memory."),
        ("console_command", "`flyrun exec -it MACHINE sh` takes the command with it."),
        ("host_dedication_id", "All machines are on this host: leave it away."),
        ("machine_checks", "Use `flyrun deploy` with [checks], or test the image before."),
        ("statics", "The proxy has no files of its own: let the app serve them."),
        ("experimental", "Write a command under [processes]; the other keys there are Fly.io's own."),
    ],
};

pub(crate) static BUILD: Section = Section {
    header: "[build]",
    keys: &[key("image", REQUIRED)],
    foreign: &[
        ("dockerfile", NO_BUILD),
        ("ignorefile", NO_BUILD),
        ("build-target", NO_BUILD),
        ("args", NO_BUILD),
        ("builder", NO_BUILD),
        ("buildpacks", NO_BUILD),
        ("builtin", NO_BUILD),
        ("settings", NO_BUILD),
        ("compression", NO_BUILD),
        ("compression_level", NO_BUILD),
    ],
};
const NO_BUILD: &str = "flyrun builds no images: build it with docker or buildah and name it under image.";

pub(crate) static DEPLOY: Section = Section {
    header: "[deploy]",
    keys: &[
        key("strategy", r#""rolling""#),
        key("wait_timeout", r#""5m""#),
        key("release_command", NONE),
        key("release_command_timeout", r#""5m""#),
    ],
    foreign: &[
        ("max_unavailable", "rolling replaces one machine after another: leave it away."),
        ("release_command_vm", "The release command has the first group's [[vm]]: leave it away."),
        ("seed_command", "Use release_command."),
    ],
};

pub(crate) static HTTP_SERVICE: Section = Section {
    header: "[http_service]",
    keys: &[
        key("internal_port", "8080"),
        key("force_https", "false"),
        key("auto_stop_machines", r#""off""#),
        key("auto_start_machines", "true"),
        key("min_machines_running", "0"),
        PROCESSES_APP,
        key("concurrency", NONE),
        key("http_options", NONE),
        key("tls_options", NONE),
        key("checks", "the port accepts a connection"),
    ],
    foreign: &[
        ("ports", "It has ports 80 and 443: for others write [[services]]."),
        ("tcp_checks", "Without checks there is one of this kind."),
        ("http_checks", "Write [[http_service.checks]]."),
        ("machine_checks", "Use [[http_service.checks]]."),
    ],
};

pub(crate) static SERVICES: Section = Section {
    header: "[[services]]",
    keys: &[
        key("internal_port", REQUIRED),
        key("protocol", r#""tcp""#),
        key("auto_stop_machines", r#""off""#),
        key("auto_start_machines", "true"),
        key("min_machines_running", "0"),
        PROCESSES_APP,
        key("ports", REQUIRED),
        key("concurrency", NONE),
        key("tcp_checks", "the port accepts a connection"),
        key("http_checks", NONE),
    ],
    foreign: &[
        ("checks", "Write [[services.http_checks]] or [[services.tcp_checks]]."),
        ("force_https", "Write it in [[services.ports]]."),
        ("machine_checks", "Use [[services.http_checks]]."),
        ("script_checks", "Use [[services.http_checks]]."),
    ],
};

pub(crate) static PORTS: Section = Section {
    header: "[[services.ports]]",
    keys: &[
        key("port", "or start_port and end_port"),
        key("start_port", NONE),
        key("end_port", NONE),
        key("handlers", "[]: raw TCP"),
        key("force_https", "false"),
        key("http_options", NONE),
        key("tls_options", NONE),
        key("proxy_proto_options", NONE),
    ],
    foreign: &[],
};

pub(crate) static CONCURRENCY: Section = Section {
    header: "[….concurrency]",
    keys: &[key("type", r#""connections""#), key("soft_limit", "20"), key("hard_limit", NONE)],
    foreign: &[],
};

pub(crate) static HTTP_OPTIONS: Section = Section {
    header: "[….http_options]",
    keys: &[
        key("h2_backend", "false"),
        key("idle_timeout", r#""1m""#),
        key("headers_read_timeout", r#""30s""#),
        key("response", NONE),
    ],
    foreign: &[("compress", "The proxy passes bodies as they are: let the app compress.")],
};

pub(crate) static RESPONSE: Section = Section {
    header: "[….http_options.response]",
    keys: &[key("pristine", "false"), key("headers", NONE)],
    foreign: &[],
};

pub(crate) static TLS_OPTIONS: Section = Section {
    header: "[….tls_options]",
    keys: &[
        key("alpn", r#"["h2", "http/1.1"] with http, else []"#),
        key("versions", r#"["TLSv1.2", "TLSv1.3"]"#),
    ],
    foreign: &[("default_self_signed", "Name a certificate under [[flyrun.tls]].")],
};

pub(crate) static PROXY_PROTO_OPTIONS: Section =
    Section { header: "[….proxy_proto_options]", keys: &[key("version", r#""v1""#)], foreign: &[] };

const INTERVAL: Key = key("interval", r#""15s""#);
const TIMEOUT: Key = key("timeout", r#""2s""#);
const GRACE_PERIOD: Key = key("grace_period", r#""1s""#);
const METHOD: Key = key("method", r#""GET""#);
const PATH: Key = key("path", r#""/""#);
const PROTOCOL: Key = key("protocol", r#""http""#);
const HEADERS: Key = key("headers", NONE);
const NO_CHECK_TLS: &str = "Checks speak plain http to the app: leave it away.";
const FOREIGN_CHECK: &[(&str, &str)] = &[
    ("tls_skip_verify", NO_CHECK_TLS),
    ("tls_server_name", NO_CHECK_TLS),
    ("restart_limit", "A check restarts nothing: leave it away."),
];

pub(crate) static TCP_CHECKS: Section = Section {
    header: "[[services.tcp_checks]]",
    keys: &[INTERVAL, TIMEOUT, GRACE_PERIOD],
    foreign: FOREIGN_CHECK,
};

const HTTP_CHECK: &[Key] = &[INTERVAL, TIMEOUT, GRACE_PERIOD, METHOD, PATH, PROTOCOL, HEADERS];

pub(crate) static HTTP_SERVICE_CHECKS: Section =
    Section { header: "[[http_service.checks]]", keys: HTTP_CHECK, foreign: FOREIGN_CHECK };

pub(crate) static HTTP_CHECKS: Section =
    Section { header: "[[services.http_checks]]", keys: HTTP_CHECK, foreign: FOREIGN_CHECK };

pub(crate) static CHECKS: Section = Section {
    header: "[checks.NAME]",
    keys: &[
        key("type", REQUIRED),
        key("port", REQUIRED),
        INTERVAL,
        TIMEOUT,
        GRACE_PERIOD,
        METHOD,
        PATH,
        PROTOCOL,
        HEADERS,
        PROCESSES_APP,
    ],
    foreign: FOREIGN_CHECK,
};

pub(crate) static VM: Section = Section {
    header: "[[vm]]",
    keys: &[
        key("size", r#""shared-cpu-1x""#),
        key("cpu_kind", r#""shared""#),
        key("cpus", "1"),
        key("memory", "256mb a shared CPU, 2gb a performance one"),
        key("memory_mb", "the same in MiB"),
        PROCESSES_ALL,
    ],
    foreign: &[
        ("gpu_kind", "Machines have no GPU: leave it away."),
        ("gpus", "Machines have no GPU: leave it away."),
        ("kernel_args", "The kernel's command line is flyrun's own: leave it away."),
        ("host_dedication_id", "All machines are on this host: leave it away."),
        ("persist_rootfs", "A machine's disk stays as long as the machine: leave it away."),
    ],
};

pub(crate) static MOUNTS: Section = Section {
    header: "[[mounts]]",
    keys: &[
        key("source", REQUIRED),
        key("destination", REQUIRED),
        key("initial_size", r#""10gb""#),
        PROCESSES_APP,
    ],
    foreign: &[
        ("snapshot_retention", "Volumes are not backed up by flyrun: leave it away."),
        ("scheduled_snapshots", "Volumes are not backed up by flyrun: leave it away."),
        ("auto_extend_size_threshold", NO_EXTEND),
        ("auto_extend_size_increment", NO_EXTEND),
        ("auto_extend_size_limit", NO_EXTEND),
    ],
};
const NO_EXTEND: &str = "A volume takes up only what is written: give it a large initial_size.";

pub(crate) static FILES: Section = Section {
    header: "[[files]]",
    keys: &[
        key("guest_path", REQUIRED),
        key("raw_value", "one of these"),
        key("local_path", "one of these"),
        key("secret_name", "one of these"),
        PROCESSES_APP,
    ],
    foreign: &[
        ("image_config", "Write raw_value, local_path or secret_name."),
        ("mode", "Files have mode 0644."),
    ],
};

pub(crate) static RESTART: Section = Section {
    header: "[[restart]]",
    keys: &[key("policy", r#""on-failure""#), key("retries", "10"), PROCESSES_ALL],
    foreign: &[("gpu_bid_price", "Machines have no GPU: leave it away.")],
};

pub(crate) static METRICS: Section = Section {
    header: "[[metrics]]",
    keys: &[key("port", REQUIRED), key("path", r#""/metrics""#), PROCESSES_APP],
    foreign: &[("https", "Metrics are read over plain http: leave it away.")],
};

pub(crate) static FLYRUN: Section = Section {
    header: "[flyrun]",
    keys: &[
        key("hostnames", r#"["*"]"#),
        key("idle_timeout", r#""1m""#),
        key("start_timeout", r#""1m""#),
        key("queue_timeout", r#""1m""#),
        key("queue_limit", "1024"),
        key("max_machines", "1"),
        key("body_timeout", NONE),
        key("total_timeout", NONE),
        key("trusted_proxies", NONE),
        key("accept_proxy_protocol", "false"),
        key("tls", NONE),
        key("acme", NONE),
    ],
    foreign: &[],
};

pub(crate) static FLYRUN_ACME: Section = Section {
    header: "[flyrun.acme]",
    keys: &[
        key("terms_of_service_agreed", REQUIRED),
        key("directory", "Let's Encrypt's"),
        key("email", NONE),
        key("ca", NONE),
    ],
    foreign: &[],
};

pub(crate) static FLYRUN_TLS: Section = Section {
    header: "[[flyrun.tls]]",
    keys: &[key("certificate", REQUIRED), key("key", REQUIRED)],
    foreign: &[],
};

/// All tables whose keys are fixed, in the order in which a file usually has them.
pub static SECTIONS: &[&Section] = &[
    &TOP,
    &BUILD,
    &DEPLOY,
    &HTTP_SERVICE,
    &SERVICES,
    &PORTS,
    &CONCURRENCY,
    &HTTP_OPTIONS,
    &RESPONSE,
    &TLS_OPTIONS,
    &PROXY_PROTO_OPTIONS,
    &HTTP_SERVICE_CHECKS,
    &HTTP_CHECKS,
    &TCP_CHECKS,
    &CHECKS,
    &VM,
    &MOUNTS,
    &FILES,
    &RESTART,
    &METRICS,
    &FLYRUN,
    &FLYRUN_TLS,
    &FLYRUN_ACME,
];

impl Section {
    /// The table in a sentence.
    pub(crate) fn place(&self) -> String {
        if self.header.is_empty() { "the top level".into() } else { self.header.into() }
    }

    /// The same behind "there is no such key".
    pub(crate) fn within(&self) -> String {
        let preposition = if self.header.is_empty() { "at" } else { "in" };
        format!("{preposition} {}", self.place())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.keys.iter().any(|key| key.name == name)
    }

    /// What to do about a name that is neither a key nor foreign.
    pub(crate) fn advice_on(&self, name: &str) -> String {
        const NEAR: f64 = 0.85;
        // Longer ones are no slip of a finger, and comparing them takes long.
        let comparable = name.len() <= 64;
        let near = |key: &&Key| (strsim::jaro_winkler(key.name, name), key.name);
        let nearest = self.keys.iter().filter(|_| comparable).map(|key| near(&key));
        if let Some((_, nearest)) =
            nearest.filter(|(near, _)| *near >= NEAR).max_by(|a, b| a.0.total_cmp(&b.0))
        {
            return format!("Did you mean '{nearest}'?");
        }
        let homes: Vec<_> =
            SECTIONS.iter().filter(|section| section.has(name)).map(|section| section.place()).collect();
        if let [home] = homes.as_slice() {
            let above = if home == "the top level" { ", above the first table" } else { "" };
            return format!("'{name}' belongs to {home}{above}.");
        }
        let known: Vec<_> = self.keys.iter().map(|key| key.name).collect();
        format!("There are: {}.", known.join(", "))
    }
}

/// The keys of fly.toml that flyrun supports, as a table in Markdown.
pub fn markdown() -> String {
    let mut text = String::from("| table | keys (defaults) |\n|---|---|\n");
    for section in SECTIONS {
        let keys: Vec<_> = section.keys.iter().map(Key::markdown).collect();
        let header =
            if section.header.is_empty() { "top level".into() } else { format!("`{}`", section.header) };
        text.push_str(&format!("| {header} | {} |\n", keys.join(", ")));
    }
    text
}

impl Key {
    fn markdown(&self) -> String {
        match self.default {
            NONE => format!("`{}`", self.name),
            default => format!("`{}` ({default})", self.name),
        }
    }
}
