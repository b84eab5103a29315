import { NatsConnectionImpl, setTransportFactory } from "@nats-io/transport-node";
import type { ConnectionOptions, NatsConnection } from "@nats-io/transport-node";
import { nodeResolveHost, NodeTransport } from "@nats-io/transport-node/lib/node_transport.js";
import type { Socket } from "node:net";
import type { TLSSocket } from "node:tls";

/**
 * The client's transport takes all listeners off its sockets, between two phases of the connection and at its end. A reset that
 * comes in such a moment has nobody to hear it and would end the process: here somebody always does. That the connection
 * is gone the client learns all the same, from the closed socket or from its time limit.
 */
class GuardedTransport extends NodeTransport {
  override async dial(hp: { hostname: string; port: number }): Promise<Socket> {
    return guard(await super.dial(hp));
  }
  override async tlsFirst(hp: { hostname: string; port: number }): Promise<TLSSocket> {
    return guard(await super.tlsFirst(hp));
  }
  override async startTLS(): Promise<TLSSocket> {
    return guard(await super.startTLS());
  }
}

function guard<T extends Socket>(socket: T): T {
  const ignore = () => {};
  const removeAll = socket.removeAllListeners.bind(socket);
  socket.removeAllListeners = (...events: (string | symbol)[]) => {
    removeAll(...events);
    socket.on("error", ignore);
    return socket;
  };
  return socket.on("error", ignore);
}

/** `connect` of the client, over guarded sockets. */
export function connectGuarded(options: ConnectionOptions): Promise<NatsConnection> {
  setTransportFactory({ factory: () => new GuardedTransport(), dnsResolveFn: nodeResolveHost });
  return NatsConnectionImpl.connect(options);
}
