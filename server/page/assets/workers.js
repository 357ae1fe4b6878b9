import { html } from "./html.js";

export function Workers() {
  return html``;
}
