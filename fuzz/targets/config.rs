//! Text that people write: configuration files of a node, of a group and of the target, and the names of
//! points, which an NBD client sends. The first byte says which.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tidemark_agent::config::AgentConfig;
use tidemark_control::config::Source;
use tidemark_target::Config;
use tidemark_target::points::PointName;

const NODE: &str = "node = \"db1\"\n";

fuzz_target!(|bytes: &[u8]| {
    let Some((which, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let source = |text: &str| Source::new(Path::new("/etc/tidemark/agent.d/shop.toml"), text);
    match which % 4 {
        0 => {
            let _ = AgentConfig::of_node(&source(text));
        }
        1 => {
            let mut config = AgentConfig::of_node(&source(NODE)).expect("a node");
            if config.add(&source(text)).is_ok() {
                config.add(&source(text)).expect_err("the same group is not there twice");
            }
        }
        2 => {
            let _ = Config::parse(text);
        }
        _ => {
            if let Ok(name) = PointName::parse(text) {
                assert_eq!(PointName::parse(&name.to_string()), Ok(name));
            }
        }
    }
});
