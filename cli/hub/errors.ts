/** A model could not be fetched. The message says what to do. */
export class HubError extends Error {
  override readonly name = "HubError";
}
