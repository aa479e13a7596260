//! Choice of the sandboxes' subnets: those of the operator, or the first that the host does not use.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{addresses::Subnets, surroundings::Surroundings};

/// Subnets to choose from, in order of preference. Each is a pair of adjacent blocks: for guests,
/// then for links.
const CHOICES: [[u8; 2]; 7] = [
    [10, 11],
    [10, 213],
    [10, 77],
    [172, 30],
    [172, 22],
    [100, 98],
    [198, 18],
];

/// Failure to find subnets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ChooseError {
    /// The operator's subnets are in use.
    #[error("{0}; choose other subnets with `WRENN_SUBNETS`")]
    Conflict(String),
    /// All subnets are in use.
    #[error(
        "all subnets that sandboxes could use are in use ({0}, …); choose two with `WRENN_SUBNETS`"
    )]
    NoneFree(String),
}

/// Returns the operator's subnets, or else the first of [`CHOICES`] that no route and no address of
/// the host overlaps.
pub(super) fn choose(
    wanted: Option<Subnets>,
    surroundings: &Surroundings,
) -> Result<Subnets, ChooseError> {
    if let Some(wanted) = wanted {
        return match surroundings.conflict(wanted) {
            Some(reason) => Err(ChooseError::Conflict(reason)),
            None => Ok(wanted),
        };
    }
    let mut first_reason = None;
    for subnets in CHOICES.into_iter().filter_map(subnets) {
        match surroundings.conflict(subnets) {
            None => return Ok(subnets),
            Some(reason) => {
                tracing::info!(%subnets, reason, "subnets skipped");
                first_reason.get_or_insert(reason);
            }
        }
    }
    Err(ChooseError::NoneFree(first_reason.unwrap_or_default()))
}

fn subnets([a, b]: [u8; 2]) -> Option<Subnets> {
    let block = |b: u8| Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), 16);
    Subnets::new(block(b), block(b.checked_add(1)?)).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::network::surroundings::{Route, RouteKind};

    fn host(routes: &[&str]) -> Surroundings {
        let route = |text: &&str| Route {
            destination: text.parse().unwrap(),
            kind: RouteKind::Unicast,
            links: vec!["eth0".to_owned()],
            direct: false,
            table: 254,
            metric: 0,
        };
        Surroundings {
            routes: routes.iter().map(route).collect(),
            ..Surroundings::default()
        }
    }

    #[test]
    fn the_first_subnets_without_a_route_are_chosen() {
        for (routes, chosen) in [
            (&["0.0.0.0/0"][..], "10.11.0.0/16 and 10.12.0.0/16"),
            (&["10.12.3.0/24"][..], "10.213.0.0/16 and 10.214.0.0/16"),
            (&["10.0.0.0/8"][..], "172.30.0.0/16 and 172.31.0.0/16"),
            (
                &["10.0.0.0/8", "172.16.0.0/12"][..],
                "100.98.0.0/16 and 100.99.0.0/16",
            ),
        ] {
            assert_eq!(choose(None, &host(routes)).unwrap().to_string(), chosen);
        }
        assert_eq!(
            CHOICES.into_iter().filter_map(subnets).count(),
            CHOICES.len()
        );
    }

    #[test]
    fn a_conflict_is_an_error_that_names_the_route_and_the_setting() {
        let wanted = Some(Subnets::DEFAULT);
        assert_eq!(choose(wanted, &host(&[])).unwrap(), Subnets::DEFAULT);
        let error = choose(wanted, &host(&["10.11.9.0/24"]))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "10.11.0.0/16 overlaps the host's route 10.11.9.0/24 (eth0); choose other subnets with `WRENN_SUBNETS`"
        );
        let all = [
            "10.0.0.0/8",
            "172.16.0.0/12",
            "100.64.0.0/10",
            "198.18.0.0/15",
        ];
        let error = choose(None, &host(&all)).unwrap_err().to_string();
        assert!(
            error.contains("10.0.0.0/8") && error.contains("WRENN_SUBNETS"),
            "{error}"
        );
    }
}
