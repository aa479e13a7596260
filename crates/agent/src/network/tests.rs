//! Tests with real namespaces, links and rules, on a private host per test.

#![allow(clippy::unwrap_used, reason = "tests")]

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

fn slot(number: u16) -> Slot {
    Slot::new(number).unwrap()
}

#[test]
fn a_network_has_all_its_parts_and_leaves_none() {
    on_a_private_host(async || {
        prepare_host().await.unwrap();
        let before = Footprint::now();
        let spec = create(slot(7), &Access::plain(true)).await.unwrap();
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
        verify(slot(7), &Access::plain(true)).await.unwrap();
        remove(slot(7)).await.unwrap();
        assert_eq!(Footprint::now(), before);
        remove(slot(7)).await.unwrap();
        assert!(matches!(
            verify(slot(7), &Access::plain(true)).await,
            Err(NetworkError::Missing(_))
        ));
    });
}

#[test]
fn twenty_networks_at_once_leave_nothing() {
    on_a_private_host(async || {
        prepare_host().await.unwrap();
        let before = Footprint::now();
        for _ in 0..2 {
            let create_all =
                (1..=20).map(|n| async move { create(slot(n), &Access::plain(n % 2 == 0)).await });
            for result in futures::future::join_all(create_all).await {
                result.unwrap();
            }
            assert_eq!(Footprint::now().namespaces, before.namespaces + 20);
            assert_eq!(
                Footprint::now().filter_elements,
                before.filter_elements + 10
            );
            let remove_all = (1..=20).map(|n| remove(slot(n)));
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
        prepare_host().await.unwrap();
        // The name of the host's link is already in use, so the last step fails.
        ip(&["link", "add", "wrenn-v9", "type", "veth", "peer", "other"]);
        let before = Footprint::now();
        let error = create(slot(9), &Access::plain(true)).await.unwrap_err();
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
        prepare_host().await.unwrap();
        let once = run("nft", &["list", "ruleset"]);
        create(slot(3), &Access::plain(true)).await.unwrap();
        let both = futures::future::join(prepare_host(), prepare_host()).await;
        both.0.unwrap();
        both.1.unwrap();
        assert_eq!(Footprint::now().filter_elements, 1);
        remove(slot(3)).await.unwrap();
        assert_eq!(run("nft", &["list", "ruleset"]), once);
    });
}

#[test]
fn a_slot_whose_namespace_lives_is_not_given_away() {
    on_a_private_host(async || {
        prepare_host().await.unwrap();
        let slots = Slots::open(Path::new("/data")).unwrap();
        let first = slots.claim(&"sb-1".parse().unwrap()).unwrap();
        create(first, &Access::plain(false)).await.unwrap();
        fs::remove_file(format!("{}/{first}", slot::SLOTS_DIR)).unwrap();
        let second = slots.claim(&"sb-2".parse().unwrap()).unwrap();
        assert_ne!(first, second);
    });
}
