// The HTTP client in Java of the comparison of languages: see client.c, which does the same.
import java.io.InputStream;
import java.net.HttpURLConnection;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.URI;
import java.net.UnknownHostException;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.ByteBuffer;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;

public class Client {
  static final int PORT = 7014;
  static final Duration LIMIT = Duration.ofSeconds(20);

  static URI uri(String host, String path) {
    return URI.create("http://" + host + ":" + PORT + path);
  }

  static String plainly(String host, String path) throws Exception {
    HttpURLConnection connection = (HttpURLConnection) uri(host, path).toURL().openConnection();
    connection.setConnectTimeout((int) LIMIT.toMillis());
    connection.setReadTimeout((int) LIMIT.toMillis());
    try (InputStream body = connection.getInputStream()) {
      return new String(body.readAllBytes(), StandardCharsets.UTF_8);
    }
  }

  public static void main(String[] names) throws Exception {
    for (String name : names) {
      try (Socket socket = new Socket()) {
        socket.connect(new InetSocketAddress(name, PORT), (int) LIMIT.toMillis());
        System.out.println(name + " is " + List.of(InetAddress.getAllByName(name)));
        System.out.println(name + " at " + socket.getRemoteSocketAddress() + " from " + socket.getLocalAddress());
      }
      System.out.println(plainly(name, "/once") + ", " + plainly(name, "/chunked"));
    }
    HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).connectTimeout(LIMIT).build();
    for (int number = 0; number < 5; number++) {
      HttpRequest request = HttpRequest.newBuilder(uri("far.test", "/kept/" + number)).timeout(LIMIT).build();
      System.out.println("kept: " + client.send(request, BodyHandlers.ofString()).body());
    }
    List<CompletableFuture<String>> answers = new ArrayList<>();
    for (int number = 0; number < 100; number++) {
      HttpRequest request = HttpRequest.newBuilder(uri("far.test", "/many/" + number)).timeout(LIMIT).build();
      answers.add(client.sendAsync(request, BodyHandlers.ofString()).thenApply(answer -> answer.body()));
    }
    int right = 0;
    for (int number = 0; number < 100; number++) {
      if (answers.get(number).get().equals("you asked for /many/" + number)) right++;
    }
    System.out.println("many: " + right);
    // A channel, connected without blocking.
    try (SocketChannel channel = SocketChannel.open()) {
      channel.configureBlocking(false);
      channel.connect(new InetSocketAddress("far.test", 7002));
      while (!channel.finishConnect()) Thread.onSpinWait();
      channel.configureBlocking(true);
      ByteBuffer welcome = ByteBuffer.allocate(7);
      while (welcome.hasRemaining() && channel.read(welcome) > 0) {}
      System.out.println("channel: " + new String(welcome.array(), StandardCharsets.UTF_8) + " at " + channel.getRemoteAddress());
    }
    try {
      InetAddress.getByName("nowhere.test");
    } catch (UnknownHostException error) {
      System.out.println("unknown name: " + error.getMessage());
    }
  }
}
