//! Configuration files: of a node, of a group, of the target. The first byte says which.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tidemark_agent::config::AgentConfig;
use tidemark_control::config::Source;
use tidemark_target::Config;

const NODE: &str = "node = \"db1\"\n";

fuzz_target!(|bytes: &[u8]| {
    let Some((which, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let source = |text: &str| Source::new(Path::new("/etc/tidemark/agent.d/shop.toml"), text);
    match which % 3 {
        0 => {
            let _ = AgentConfig::of_node(&source(text));
        }
        1 => {
            let mut config = AgentConfig::of_node(&source(NODE)).expect("a node");
            if config.add(&source(text)).is_ok() {
                config.add(&source(text)).expect_err("the same group is not there twice");
            }
        }
        _ => {
            let _ = Config::parse(text);
        }
    }
});
