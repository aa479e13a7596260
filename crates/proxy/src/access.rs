//! Access checks, made before a sandbox is resumed or waited for.
//!
//! | port | request | sandbox runs | sandbox must be resumed or waited for |
//! |---|---|---|---|
//! | any except the guest agent's | lacks the traffic token that the sandbox requires | 403 | 403 |
//! | the guest agent's | link with the right signature that has expired | 401 | 401 |
//! | the guest agent's | lacks the right token and the right signature | forwarded | 401 |
//! | the guest agent's | `/health` without the right token | forwarded | 502: it does not run |
//! | the guest agent's | CORS preflight | forwarded | answered by the proxy |
//!
//! "Forwarded": the guest agent checks tokens and signatures itself, so a running one is asked. The
//! response is the same in both cases.

use http::Request;
use subtle::ConstantTimeEq as _;
use wrenn_proto::guest;

use crate::{
    Found, SignedLink, Target,
    failure::{self, Failure},
    headers,
};

/// Path of the guest agent's health check, which is open to all.
const HEALTH: &str = "/health";

/// Rejects a request whose client has no access to the port.
pub(crate) fn check<B>(request: &Request<B>, port: u16, found: &Found) -> Result<(), Failure> {
    if port == guest::ENVD_PORT {
        return check_guest_token(request, found);
    }
    check_traffic_token(&found.target, request.headers())
}

/// Checks the traffic access token. Only clients with the token may reach the ports of a sandbox
/// that is not public. The guest agent has its own token.
fn check_traffic_token(target: &Target, headers: &http::HeaderMap) -> Result<(), Failure> {
    let Some(token) = &target.traffic_token else {
        return Ok(());
    };
    let shown = headers
        .get(failure::TRAFFIC_TOKEN)
        .ok_or(Failure::NoTrafficToken)?;
    if is_same(shown.as_bytes(), token) {
        Ok(())
    } else {
        Err(Failure::BadTrafficToken)
    }
}

/// Applies the guest agent's rules, as far as the module documentation says.
fn check_guest_token<B>(request: &Request<B>, found: &Found) -> Result<(), Failure> {
    let target = &found.target;
    let Some(token) = target.guest_token.as_deref().filter(|_| !target.is_open) else {
        return Ok(());
    };
    let uri = request.uri();
    let failure = match request.headers().get(headers::ACCESS_TOKEN) {
        Some(shown) if is_same(shown.as_bytes(), token) => return Ok(()),
        Some(_) => Failure::BadGuestToken,
        None => {
            let query = uri.query().unwrap_or_default();
            match SignedLink::parse(request.method(), uri.path(), query) {
                // This machine's clock decides: the guest's may be behind after a restore.
                Some(link) if link.is_signed_with(token) => {
                    return match link.has_expired() {
                        true => Err(Failure::LinkExpired),
                        false => Ok(()),
                    };
                }
                Some(_) => Failure::BadSignature,
                None => Failure::BadGuestToken,
            }
        }
    };
    if found.is_running {
        return Ok(());
    }
    // The health check is open to all. Its answer is that the sandbox does not run.
    match uri.path() == HEALTH && failure == Failure::BadGuestToken {
        true => Err(Failure::NotFound),
        false => Err(failure),
    }
}

fn is_same(shown: &[u8], token: &str) -> bool {
    bool::from(shown.ct_eq(token.as_bytes()))
}
