//! Values that are one of a few words.

use super::model::*;

/// A type whose values have names in fly.toml.
pub trait Named: Copy + PartialEq + 'static {
    /// Every value with its name.
    const NAMES: &'static [(&'static str, Self)];

    /// This value's name.
    fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, value)| *value == self).map_or("", |(name, _)| name)
    }

    /// The value of this name.
    fn named(text: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
    }
}

impl Named for Signal {
    const NAMES: &'static [(&'static str, Signal)] = &[
        ("SIGINT", Signal::Int),
        ("SIGTERM", Signal::Term),
        ("SIGQUIT", Signal::Quit),
        ("SIGUSR1", Signal::Usr1),
        ("SIGUSR2", Signal::Usr2),
        ("SIGKILL", Signal::Kill),
        ("SIGSTOP", Signal::Stop),
    ];
}

impl Named for Strategy {
    const NAMES: &'static [(&'static str, Strategy)] =
        &[("rolling", Strategy::Rolling), ("bluegreen", Strategy::Bluegreen)];
}

impl Named for AutoStop {
    const NAMES: &'static [(&'static str, AutoStop)] =
        &[("off", AutoStop::Off), ("stop", AutoStop::Stop), ("suspend", AutoStop::Suspend)];
}

impl Named for Load {
    const NAMES: &'static [(&'static str, Load)] =
        &[("connections", Load::Connections), ("requests", Load::Requests)];
}

impl Named for CpuKind {
    const NAMES: &'static [(&'static str, CpuKind)] =
        &[("shared", CpuKind::Shared), ("performance", CpuKind::Performance)];
}

impl Named for TlsVersion {
    const NAMES: &'static [(&'static str, TlsVersion)] =
        &[("TLSv1.2", TlsVersion::V1_2), ("TLSv1.3", TlsVersion::V1_3)];
}

impl Named for ProxyProtocol {
    const NAMES: &'static [(&'static str, ProxyProtocol)] =
        &[("v1", ProxyProtocol::V1), ("v2", ProxyProtocol::V2)];
}

impl Named for Method {
    const NAMES: &'static [(&'static str, Method)] = &[
        ("GET", Method::Get),
        ("HEAD", Method::Head),
        ("OPTIONS", Method::Options),
        ("POST", Method::Post),
        ("PUT", Method::Put),
    ];
}
