/** Base of every error of the bus room. */
export class BusError extends Error {
  override name = "BusError";
}

/** The bus, or the subscription a request waits on, was closed. */
export class BusClosedError extends BusError {
  override name = "BusClosedError";
}

/** The server cannot be reached, or refuses; the message says which. */
export class BusConnectError extends BusError {
  override name = "BusConnectError";
}

/** A message is larger than the transport takes. */
export class PayloadTooLargeError extends BusError {
  override name = "PayloadTooLargeError";
  /** Bytes of the message. */
  readonly bytes: number;
  /** Bytes that the transport takes. */
  readonly maxPayload: number;

  constructor(subject: string, bytes: number, maxPayload: number) {
    super(`message to ${subject} has ${bytes} bytes; the bus takes ${maxPayload}`);
    this.bytes = bytes;
    this.maxPayload = maxPayload;
  }
}

/** A request got no answer in time. */
export class RequestTimeoutError extends BusError {
  override name = "RequestTimeoutError";
}

/** Nobody subscribes to the subject of a request. */
export class NoRespondersError extends BusError {
  override name = "NoRespondersError";
}

/** A subject or subscription pattern is malformed. */
export class SubjectError extends BusError {
  override name = "SubjectError";
}

/** Bytes or JSON from the bus are not what they claim to be. The only error that decoders throw. */
export class WireError extends BusError {
  override name = "WireError";
}
