//! Tests with real namespaces, links and rules, on a private host per test.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use super::{slot::Slots, *};
use crate::private_host::{self, Footprint, ip, run};

fn on_a_private_host<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    private_host::enter();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test());
}

async fn host() -> HostNetwork {
    let opened = HostNetwork::open("0a1b", NetworkSettings::default()).await;
    opened.unwrap()
}

fn slot(number: u16) -> Slot {
    Slot::new(number).unwrap()
}

#[test]
fn a_network_has_all_its_parts_and_leaves_none() {
    on_a_private_host(async || {
        let host = host().await;
        let before = Footprint::now();
        let spec = host.create(slot(7), &Access::plain(true)).await.unwrap();
        assert_eq!(spec.host_ip.to_string(), "10.11.0.7");
        assert!(ip(&["-o", "addr", "show", "wrenn-v7"]).contains("10.12.0.14/31"));
        assert!(ip(&["route"]).contains("10.11.0.7 via 10.12.0.15 dev wrenn-v7"));
        let inside = |args: &[&str]| ip(&[&["netns", "exec", "wrenn-ns-7", "ip"], args].concat());
        assert!(inside(&["-o", "addr", "show", "eth0"]).contains("10.12.0.15/31"));
        let tap = inside(&["-o", "addr", "show", "tap0"]);
        assert!(tap.contains("169.254.0.22/30"), "{tap}");
        assert!(inside(&["link", "show", "tap0"]).contains("02:fc:00:00:00:06"));
        assert!(inside(&["link", "show", "tap0"]).contains("qlen 5000"));
        assert!(inside(&["route"]).contains("default via 10.12.0.14 dev eth0"));
        assert!(inside(&["-6", "addr"]).is_empty(), "IPv6 is on");
        assert_eq!(Footprint::now().filter_elements, before.filter_elements + 1);
        host.verify(slot(7), &Access::plain(true)).await.unwrap();
        host.remove(slot(7)).await.unwrap();
        assert_eq!(Footprint::now(), before);
        host.remove(slot(7)).await.unwrap();
        assert!(matches!(
            host.verify(slot(7), &Access::plain(true)).await,
            Err(NetworkError::Missing(_))
        ));
    });
}

#[test]
fn twenty_networks_at_once_leave_nothing() {
    on_a_private_host(async || {
        let host = host().await;
        let before = Footprint::now();
        for _ in 0..2 {
            let host = &host;
            let create_all = (1..=20)
                .map(|n| async move { host.create(slot(n), &Access::plain(n % 2 == 0)).await });
            for result in futures::future::join_all(create_all).await {
                result.unwrap();
            }
            assert_eq!(Footprint::now().namespaces, before.namespaces + 20);
            assert_eq!(
                Footprint::now().filter_elements,
                before.filter_elements + 10
            );
            let remove_all = (1..=20).map(|n| host.remove(slot(n)));
            for result in futures::future::join_all(remove_all).await {
                result.unwrap();
            }
            assert_eq!(Footprint::now(), before);
        }
    });
}

#[test]
fn a_create_that_fails_undoes_what_it_did() {
    on_a_private_host(async || {
        let host = host().await;
        // The name of the host's link is already in use, so the last step fails.
        ip(&["link", "add", "wrenn-v9", "type", "veth", "peer", "other"]);
        let before = Footprint::now();
        let error = host
            .create(slot(9), &Access::plain(true))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("link to the host"), "{error}");
        let mut after = Footprint::now();
        // The slot owns the name, so the conflicting link is removed as well.
        assert_eq!(after.links, before.links - 2);
        after.links = before.links;
        assert_eq!(after, before);
    });
}

#[test]
fn host_rules_applied_again_neither_pile_up_nor_lose_a_sandbox() {
    on_a_private_host(async || {
        let first = host().await;
        let once = run("nft", &["list", "ruleset"]);
        first.create(slot(3), &Access::plain(true)).await.unwrap();
        // As when the agent is restarted: the next one does not know the sandbox yet.
        let second = host().await;
        assert_eq!(Footprint::now().filter_elements, 1);
        second.verify(slot(3), &Access::plain(true)).await.unwrap();
        assert_eq!(Footprint::now().filter_elements, 1);
        second.remove(slot(3)).await.unwrap();
        assert_eq!(run("nft", &["list", "ruleset"]), once);
    });
}

#[test]
fn a_link_that_an_agent_left_behind_is_replaced() {
    on_a_private_host(async || {
        let gone = HostNetwork::open("dead", NetworkSettings::default())
            .await
            .unwrap();
        gone.create(slot(3), &Access::plain(true)).await.unwrap();
        ip(&["link", "del", "wrenn-v3"]);
        ip(&["netns", "del", "wrenn-ns-3"]);
        let host = host().await;
        host.create(slot(3), &Access::plain(true)).await.unwrap();
        let rules = run("nft", &["list", "map", "inet", "wrenn", "links"]);
        assert!(rules.contains("goto agent_0a1b"), "{rules}");
        host.remove(slot(3)).await.unwrap();
        // Revoking works for it as well.
        let gone = HostNetwork::open("beef", NetworkSettings::default()).await;
        gone.unwrap()
            .create(slot(4), &Access::plain(true))
            .await
            .unwrap();
        host.remove(slot(4)).await.unwrap();
        assert_eq!(Footprint::now().filter_elements, 0);
    });
}

#[test]
fn rules_of_release_0_1_0_are_replaced() {
    on_a_private_host(async || {
        std::fs::write(
            "/run/old",
            r#"
            add table inet wrenn { comment "Wrenn sandboxes, rules version 1"; }
            add set inet wrenn egress { type ifname . ipv4_addr; }
            add chain inet wrenn input { type filter hook input priority -10; policy accept; }
            add chain inet wrenn forward { type filter hook forward priority -10; policy accept; }
            add chain inet wrenn postrouting { type nat hook postrouting priority srcnat; policy accept; }
            add rule inet wrenn forward iifname . ip saddr @egress accept
            add rule inet wrenn postrouting ip saddr 10.12.0.0/16 oifname != "lo" masquerade
            add element inet wrenn egress { "wrenn-v1" . 10.12.0.3 }
            "#,
        )
        .unwrap();
        run("nft", &["-f", "/run/old"]);
        host().await;
        let rules = run("nft", &["list", "table", "inet", "wrenn"]);
        assert!(
            !rules.contains("@egress") && !rules.contains("10.12.0.0/16"),
            "{rules}"
        );
        assert!(rules.contains("fib daddr type != unicast drop"), "{rules}");
    });
}

#[test]
fn a_slot_whose_namespace_lives_is_not_given_away() {
    on_a_private_host(async || {
        let host = host().await;
        let slots = Slots::open(Path::new("/data")).unwrap();
        let first = slots.claim(&"sb-1".parse().unwrap()).unwrap();
        host.create(first, &Access::plain(false)).await.unwrap();
        fs::remove_file(format!("{}/{first}", slot::SLOTS_DIR)).unwrap();
        let second = slots.claim(&"sb-2".parse().unwrap()).unwrap();
        assert_ne!(first, second);
    });
}
