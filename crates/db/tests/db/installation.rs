//! Identity of the installation.

use crate::support::Place;

on_both!(an_installation_keeps_its_id_and_another_database_has_another);

async fn an_installation_keeps_its_id_and_another_database_has_another(place: Place) {
    let db = place.open().await;
    let (first, second) = tokio::join!(db.installation_id(), db.installation_id());
    let id = first.unwrap();
    assert_eq!(id, second.unwrap());
    db.close().await;
    let again = place.open().await;
    assert_eq!(again.installation_id().await.unwrap(), id);
    let other = place.another();
    let other = other.open().await;
    assert_ne!(other.installation_id().await.unwrap(), id);
}
