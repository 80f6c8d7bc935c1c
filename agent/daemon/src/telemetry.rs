//! Logs of a long-running command: set up once, on stderr, as text or JSON.
//!
//! Never writes to stdout, which belongs to data. Metrics are in `metrics`.

use std::io::{IsTerminal, stderr};

use anyhow::Context;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{LogConfig, LogFormat};

/// Installs the process-wide subscriber. To be called once, before anything is logged.
pub(crate) fn init(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log_level)
        .with_context(|| format!("--log-level {:?} is not a tracing filter", config.log_level))?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = fmt::layer().with_writer(stderr);
    match config.log_format {
        LogFormat::Text => {
            registry.with(layer.with_ansi(stderr().is_terminal()).with_target(false)).try_init()
        }
        LogFormat::Json => {
            registry.with(layer.json().flatten_event(true).with_current_span(false)).try_init()
        }
    }
    .context("logging is already set up")
}
