//! A replica is removed when nobody can be using it any more, and then as a whole.

mod common;

use common::{Lab, run, source::Source};
use tidemark_control::target::{BranchRequest, TargetClient};
use tidemark_journal::GapReason;

#[test]
fn a_replica_is_forgotten_once_its_group_is_not_configured() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        let mut source = Source::new(&[1 << 20]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        source.write(0, 0, &[7; 4096]);
        source.send().await;
        source.acknowledged().await;
        let api = TargetClient::new(&lab.config.api.socket);
        let branch = BranchRequest {
            name: Some("test".to_owned()),
            group: "shop".to_owned(),
            volume: None,
            point: "latest".to_owned(),
            temporary: false,
        };
        api.create_branch(&branch).await.expect("made");

        // Whether its source is connected or not.
        for _ in 0..2 {
            let refused = api.forget("shop").await.expect_err("it is configured").to_string();
            assert!(refused.contains("take its [[group]] out"), "{refused}");
            source.disconnect();
        }
        assert!(lab.log_dir().exists());

        let mut other = lab.config.groups[0].clone();
        other.name = "other".parse().expect("a name");
        let shop = std::mem::replace(&mut lab.config.groups[0], other);
        lab.restart();
        for (name, words) in
            [("shop2", "'shop2'; outside its configuration it keeps shop"), ("..", "'..'")]
        {
            let refused = api.forget(name).await.expect_err("nothing of that name").to_string();
            assert!(refused.contains(words), "{refused}");
        }
        assert!(lab.log_dir().exists());
        api.forget("shop").await.expect("nobody uses it");
        assert!(!lab.config.data_dir.join("groups/shop").exists());
        let again = api.forget("shop").await.expect_err("it is gone").to_string();
        assert!(again.ends_with("keeps nothing of a group 'shop'"), "{again}");

        // A group of the same name begins from nothing.
        lab.config.groups.push(shop);
        lab.restart();
        assert!(api.branches().await.expect("an answer").branches.is_empty());
        let mut anew = Source::new(&[1 << 20]);
        assert_eq!(anew.connect(&lab).await.position, None);
    });
}
